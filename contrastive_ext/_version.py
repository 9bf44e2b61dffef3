"""The one place that states the version; pyproject.toml, the wheel and `contrastive_ext.__version__` read it."""

__version__ = "0.1.0"
