"""Which loss when, measured: trainings on data with real false negatives, several seeds, one budget for every loss.

    python -m study                    all runs, an hour on two cores: bench/results/local/study.json
    python -m study --only "beta"      the questions whose names match
    python -m study show FILE          tables and pictures of a results file, into docs/ with --site docs

In reading order: `questions.py` (what is asked, as a table of runs), `digits.py` (small encoders on scikit-learn's
digits), `docstrings.py` (heads on frozen MiniLM features of docstring-code pairs, and the whole model), `results.py`
(the file, means, paired differences), `views.py` (tables, pictures), `one.py` and `__main__.py` (processes). It stands
beside the library and uses nothing of `bench`.
"""
