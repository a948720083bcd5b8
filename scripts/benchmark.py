#!/usr/bin/env python3
"""Measures accel against its peers in interleaved rounds, and writes JSON, a Markdown table and a plot.

scripts/peers.sh                                                    # once: the peers' environments
python scripts/benchmark.py --suite encoder --json benchmarks/encoder.json
python scripts/benchmark.py --report benchmarks/*.json --plot benchmarks/benchmark.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from accel.bench.cases import SUITES  # noqa: E402
from accel.bench.main import measure_suite  # noqa: E402
from accel.bench.plot import plot_results  # noqa: E402
from accel.bench.report import markdown, read_result, write_result  # noqa: E402
from accel.errors import AccelError  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=list(SUITES), help="measure this suite")
    what.add_argument("--report", nargs="+", type=Path, metavar="JSON", help="only show earlier results")
    parser.add_argument("--peers", nargs="+", help="only these peers (default: all of the suite)")
    parser.add_argument("--subject", help="measure this variant of accel in place of the suite's own")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 15; 3 for memory and export)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each peer, and cores used (default 2)")
    parser.add_argument("--quick", action="store_true", help="two rounds: checks that everything runs")
    parser.add_argument("--refresh", action="store_true", help="make all exports anew")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="models, exports and environments")
    parser.add_argument("--json", type=Path, help="write the result here (default .cache/bench/results/SUITE.json)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.report:
            results = [read_result(path) for path in options.report]
        else:
            result = measure_suite(
                options.suite,
                options.cache,
                options.peers,
                options.rounds,
                options.threads,
                options.quick,
                options.refresh,
                options.subject,
            )
            write_result(result, options.json or options.cache / "bench" / "results" / f"{options.suite}.json")
            results = [result]
        print("\n".join(markdown(result) for result in results))
        if options.plot:
            plot_results(results, options.plot)
    except (AccelError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
