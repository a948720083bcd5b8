"""``python -m accel``."""

from __future__ import annotations

from accel.cli import main

if __name__ == "__main__":
    code = main()
    # A KeyboardInterrupt that passed through exec() of a string, which much generated code is, makes ``python -m``
    # end by SIGINT although it was caught; the next exec() of a string makes CPython forget it (run_eval_code_obj).
    exec("")
    raise SystemExit(code)
