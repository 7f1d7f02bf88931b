"""What a machine can do and what limits a scan on it: `llmfp-fast bench`.

`machine` describes it, `samples` makes what is measured on, `measures` measures, `records` is what comes of that.
The suites in bench/ compare with peers and gate targets; this runs anywhere the wheel is installed, in two minutes.
"""
