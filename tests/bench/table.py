"""Series of measurements, and how they are shown."""

import statistics


def show(title, unit, series, *, against):
    """Print ``series`` (name -> values) with medians, spread, and the ratio of each median to that of ``against``."""
    print(f"\n{title} ({unit})")
    print(f"  {'':28} {'median':>9} {'least':>9} {'most':>9} {'ratio':>7}")
    base = statistics.median(series[against])
    facts = {}
    for name, values in series.items():
        median = statistics.median(values)
        ratio = median / base if base else float("nan")
        print(f"  {name:28} {median:9.1f} {min(values):9.1f} {max(values):9.1f} {ratio:7.2f}")
        facts[name] = {"unit": unit, "median": median, "ratio": ratio, "values": values}
    return facts
