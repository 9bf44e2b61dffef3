"""`import contrastive_ext`: what it loads beside torch, what it says, which names it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import contrastive_ext as ce

_LOADED = """
import json, sys
import torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(statement: str, **environment: str) -> tuple[list[str], str]:
    """Modules that `statement` loads in a process that has torch, and what it writes on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED.format(statement=statement)],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_importing_the_package_loads_nothing_that_torch_has_not_loaded(tmp_path):
    # a CUDA toolkit without a GPU is what torch.utils.cpp_extension warns about at its import
    loaded, said = loaded_by("import contrastive_ext", CUDA_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    foreign = [name for name in loaded if name.split(".")[0] != "contrastive_ext"]
    assert [name for name in foreign if name.split(".")[0] not in sys.stdlib_module_names] == []
    assert len(foreign) < 10, f"standard library, and much of it: {foreign}"
    assert not any(name.startswith("contrastive_ext.theory") for name in loaded), (
        "theory is for a study before training"
    )
    assert "contrastive_ext.triton_kernels" not in loaded
    assert said == ""


@pytest.mark.parametrize(
    "statement",
    [
        "from contrastive_ext import theory; theory.coverage_probability",
        "import contrastive_ext; contrastive_ext.theory.coverage_probability",
        "import contrastive_ext.theory; contrastive_ext.theory.coverage_probability",
        "from contrastive_ext import *; theory.coverage_probability",
    ],
)
def test_theory_is_there_as_soon_as_it_is_asked_for(statement):
    assert "contrastive_ext.theory.coupon" in loaded_by(statement)[0]


def test_dir_shows_the_public_names_and_they_exist():
    assert dir(ce) == sorted(ce.__all__)
    assert all(getattr(ce, name) is not None for name in ce.__all__)
    public = {name for name, x in vars(ce).items() if getattr(x, "__module__", "").startswith("contrastive_ext.")}
    assert {name for name in public if not name.startswith("_")} <= set(ce.__all__)


def test_a_name_that_is_none_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fused_debaised_loss'"):
        ce.fused_debaised_loss  # noqa: B018
