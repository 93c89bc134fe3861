"""How long, how large, how much memory: reports of 100 to 10,000 records.

    python benchmarks/report.py [--browser] [--out benchmarks/results/report.json]

Each size is measured in a process of its own: records are written first, then everything that
`cmbench report` does (read, validate, aggregate, rank, render all pages) is timed. With --browser a
page of 500 rows is opened in headless chromium and timed until it answers a sort. With --out the
figures are written as JSON with the versions and the load of the machine that made them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))

SIZES = (100, 300, 1000, 3000, 10_000)
DATASETS, NFES, SEEDS = 5, (1, 2, 4, 8), 3


def write_records(root: Path, count: int, datasets: int = DATASETS) -> None:
    """Write ``count`` records in ``datasets`` folders: methods x NFE x seeds."""
    from record_factory import metric, record

    made = 0
    method = 0
    while made < count:
        for dataset in range(datasets):
            folder = root / f"data{dataset}"
            folder.mkdir(parents=True, exist_ok=True)
            for nfe in NFES:
                for seed in range(SEEDS):
                    if made == count:
                        return
                    value = (method % 97 + 1) / nfe + 0.05 * ((seed * 7 + method) % 3)
                    metrics = {
                        name: metric(value, name, higher=name != "fd-digits")
                        for name in ("fd-digits", "precision", "recall", "density", "coverage")
                    }
                    item = record(
                        f"method{method:04d}",
                        nfe=nfe,
                        seed=seed,
                        dataset=f"data{dataset}",
                        metrics=metrics,
                    )
                    (folder / f"{item.cell}.json").write_text(item.to_json())
                    made += 1
        method += 1


def measure(root: Path) -> dict[str, float]:
    """Render every page of ``root/records``; return seconds, peak MiB and page sizes."""
    from cmbench.records.folders import read_records
    from cmbench.report import render

    began, spent = time.perf_counter(), time.process_time()
    folders = sorted((root / "records").iterdir())
    written = render({f.name: read_records(f) for f in folders}, root / "reports")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - spent,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "largest_page_mb": max(p.stat().st_size for p in written if p.suffix == ".html") / 1e6,
    }


def in_process(count: int) -> dict[str, float]:
    """Write ``count`` records and measure their report in a fresh interpreter."""
    with TemporaryDirectory() as name:
        write_records(Path(name) / "records", count)
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)


def browse() -> dict[str, float]:
    """Open a page of 500 rows (1,500 records) and return its size and times in milliseconds."""
    from selenium import webdriver

    from cmbench.records.folders import read_records
    from cmbench.report import render

    with TemporaryDirectory() as name:
        root = Path(name)
        write_records(root / "records", 1500, datasets=1)
        render({"data0": read_records(root / "records" / "data0")}, root)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.get("about:blank")
            # Durations in CPU time of the page's thread: a busy machine does not lengthen them.
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            driver.get((root / "data0.html").as_uri())
            timing = "return performance.getEntriesByType('navigation')[0]"
            loaded = driver.execute_script(timing)["domContentLoadedEventEnd"]
            told = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            busy = next(item["value"] for item in told if item["name"] == "TaskDuration")
            act = (
                "const t = performance.now(); document.querySelectorAll('thead button')[3].click();"
                "document.body.offsetHeight; return performance.now() - t"
            )
            search = (
                "const t = performance.now(); const s = document.getElementById('search');"
                "s.value = 'method0001'; s.dispatchEvent(new Event('input'));"
                "document.body.offsetHeight; return performance.now() - t"
            )
            rows = "return document.querySelectorAll('tr[data-row]').length"
            return {
                "rows": driver.execute_script(rows),
                "page_mb": (root / "data0.html").stat().st_size / 1e6,
                "interactive_ms": loaded,
                "interactive_cpu_ms": busy * 1000,
                "sort_ms": driver.execute_script(act),
                "search_ms": driver.execute_script(search),
            }
        finally:
            driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Path(arguments.child))))
        return
    head = ("records", "seconds", "CPU s", "ms/record", "peak MiB", "page MB")
    print("{:>8} {:>8} {:>8} {:>10} {:>9} {:>8}".format(*head))
    results: list[dict[str, float]] = []
    load = os.getloadavg()[0]
    for count in arguments.sizes:
        found = in_process(count)
        results.append({"records": count} | found)
        print(
            f"{count:>8} {found['seconds']:>8.2f} {found['cpu_seconds']:>8.2f} "
            f"{found['cpu_seconds'] / count * 1000:>10.2f} {found['peak_mib']:>9.0f} "
            f"{found['largest_page_mb']:>8.2f}"
        )
    page = browse() if arguments.browser else None
    if page is not None:
        print(json.dumps(page))
    if arguments.out is not None:
        made = {"reports": rounded(results), "page_of_500_rows": page and rounded([page])[0]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(made | surroundings(load), indent=1) + "\n")


def rounded(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: float(f"{value:.4g}") for name, value in item.items()} for item in found]


def surroundings(load: float) -> dict[str, object]:
    """Return versions and machine; ``load`` is the load average when the run began."""
    from importlib.metadata import version

    import cmbench

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    told = [chromium, "--version"] if chromium else ["true"]
    browser = subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "versions": {
            "cmbench": cmbench.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "pydantic", "jinja2")},
            "browser": browser,
        },
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": round(load, 2),
    }


if __name__ == "__main__":
    main()
