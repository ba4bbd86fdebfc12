"""The pictures of the README: docs/page.png, the chat page while the demo model answers, and
docs/report.png, the head of a report. Needs playwright and a Chromium.

python benchmarks/screenshot.py [--report artifacts/demo_w4_kv8/report.html] [--chromium
/path/to/chromium]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
FIRST, SECOND = "How do I write a coroutine in Python?", "And how do I wait for it?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--chromium",
        default=shutil.which("chromium"),
        help="by default what is called so, else playwright's own",
    )
    parser.add_argument("--report", type=Path, help="take the picture of this report instead")
    parser.add_argument("--output", type=Path, help="by default docs/page.png, or docs/report.png")
    args = parser.parse_args()
    output = args.output or ROOT / "docs" / ("report.png" if args.report else "page.png")
    if args.report:
        shoot_report(args.report, output, args.chromium)
    else:
        serve_and_shoot(output, args.chromium)
    print(f"{output}: {output.stat().st_size} bytes")


def shoot_report(report: Path, output: Path, chromium: str | None) -> None:
    """Its head, and the errors of its linears beneath."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1060, "height": 1180}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        # What lies between the tables and that picture is left out, so that both are seen at once.
        page.evaluate("""() => {
                const [head, tables, first] = [...document.querySelectorAll("h2")];
                for (const title of ["KL divergence by position", "Error of the residual stream after each layer"])
                    [...document.querySelectorAll("figure")].find(f => f.querySelector("h3").textContent === title)?.remove();
                tables.nextElementSibling.remove(); tables.remove();
            }""")
        page.screenshot(path=output)
        browser.close()


def serve_and_shoot(output: Path, chromium: str | None) -> None:
    command = (
        "-m quantflow.cli.main serve calib_data/demo_model --port 0 --max-batch-size 8"
        " --cache-max-entry-count 0.01"
    )
    with subprocess.Popen(
        [sys.executable, *command.split()], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        try:
            shoot(server.stdout.readline().split()[1], output, chromium)
        finally:
            server.terminate()


def shoot(address: str, output: Path, chromium: str | None) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        page = browser.new_page(
            viewport={"width": 1280, "height": 800}, color_scheme="light", reduced_motion="reduce"
        )
        page.goto(address)
        page.click("#settings-toggle")
        # Greedy, and with a penalty that keeps so small a model from going round in circles.
        for name, value in {
            "temperature": "0",
            "repetition_penalty": "1.2",
            "max_tokens": "60",
        }.items():
            page.fill(f"#{name}", value)
        page.mouse.move(0, 0)  # so that no button looks pressed
        page.fill("#prompt", FIRST)
        page.press("#prompt", "Enter")
        page.wait_for_selector(".stats >> text=tokens/s")
        page.fill("#max_tokens", "300")
        page.fill("#prompt", SECOND)
        page.press("#prompt", "Enter")
        page.wait_for_function(
            "() => document.querySelector('.answer.running .body')?.textContent.length > 120"
        )
        page.wait_for_function("() => document.getElementById('kv-meter').value > 0")
        output.parent.mkdir(exist_ok=True)
        page.screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    main()
