"""``python3 -m tests.bench [NAME …] [--runs N] [--json FILE]``: all measurements, or those named.

What is compared runs in turns, within one run of this program; what counts is the ratio of medians. Tables, and at the
end all numbers as a line of JSON.
"""

import argparse
import json
import sys

from . import channel, log, machine, migration, round_trip, startup

MEASUREMENTS = {
    "startup": startup.measure,
    "channel": channel.measure,
    "round-trip": round_trip.measure,
    "machine": machine.measure,
    "log": log.measure,
    "migration": migration.measure,
}


def main():
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=9, help="of each that is compared (default: 9)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    words = parser.parse_args()
    results = {}
    for name in words.names or MEASUREMENTS:
        if name not in MEASUREMENTS:
            parser.error(f"there is no measurement {name!r}")
        results[name] = MEASUREMENTS[name](words.runs)
    print(f"\n{json.dumps(results)}")
    if words.json:
        with open(words.json, "w", encoding="ascii") as file:
            json.dump(results, file, indent=2)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
