"""Our artifacts beside small honest baselines of other methods, on one pair, in one run, at equal true bytes.

    python -m tests.benchmarks.delta_peers --base DIR --variant DIR --text CALIBRATION --eval-text TEXT

Every row is really written to disk and read back: what is evaluated is what the counted bytes decode to. Rows of ours
come from ``rows.toml`` and are made by the command line; peers are in ``peers.py`` and ``adapter.py``.
"""
