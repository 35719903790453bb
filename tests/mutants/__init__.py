"""How much of peftlab the tests run, and how much of it they would miss if it were wrong.

    cd tests
    python -m mutants cover     # which test runs which line
    python -m mutants run       # 400 small faults: does a test fail?
    python -m mutants write     # data/results/mutants.json

It needs `pip install -e ".[mutants]"`, and triton for the kernels of four bits. `cover` takes about
half an hour of one core and `run` an hour. Both go on where they were stopped: what they find lies
in `build/mutants`, or in `--work`.
"""
