"""The losses under the names of other libraries: change one import and keep the training code.

One file per host, classes and arguments named as there; each file says what differs and why. Floor 7: it uses the
public losses and nothing uses it; `import contrastive_ext` imports none of them.

In reading order: `hosts.py` (what the files share), `info_nce.py`, `open_clip.py`, `lightly.py`, `supcon.py`,
`grad_cache.py` need no host; `pytorch_metric_learning.py`, `sentence_transformers.py` and `lightning.py` subclass their
host's classes and raise ImportError without it.
"""
