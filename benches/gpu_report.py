"""Puts together what benches/gpu.sh gathered in a folder: RESULTS/GPU.json and a summary on stdout.

    python3 benches/gpu_report.py LOGS RESULTS ECHOGRAD

Exit status: 0 if every step passed, 1 if not.
"""

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

OUTPUT_LINES = 40


def read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def version(*command):
    """The line of a tool's answer that has its version, or none."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in answer.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[-1] if lines else None


def document(logs, name):
    """The JSON that a step printed, or none."""
    try:
        return json.loads(read(logs / f"{name}.out"))
    except ValueError:
        return None


def steps(logs):
    """What ran, how it ended, and the end of what it said; of failed steps all streams."""
    found = []
    for line in read(logs / "steps").splitlines():
        name, status, seconds, command = line.split("\t", 3)
        out, err = (read(logs / f"{name}.{stream}").strip().splitlines() for stream in ("out", "err"))
        step = {"name": name, "command": command, "status": int(status), "seconds": int(seconds)}
        if int(status):
            step["stdout"], step["stderr"] = out[-OUTPUT_LINES:], err[-OUTPUT_LINES:]
        elif name not in ("profile", "pytorch"):
            step["stdout"] = out[-OUTPUT_LINES:] if name == "doctor" else out[-1:]
        found.append(step)
    return found


def main():
    logs, results, echograd = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    gpu, driver, memory, clock = (word.strip() for word in read(logs / "gpu").splitlines()[0].split(","))
    ran = steps(logs)
    profile, pytorch = document(logs, "profile"), document(logs, "pytorch")
    for step in ran:
        if step["name"] in ("profile", "pytorch") and step["status"] == 0 and document(logs, step["name"]) is None:
            step["status"], step["stderr"] = 1, ["its output is not JSON"]
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": {"name": gpu, "driver": driver, "memory": memory, "max_sm_clock": clock},
        "versions": {
            "echograd": version(echograd, "--version"),
            "nvcc": version("nvcc", "--version"),
            "compute-sanitizer": version("compute-sanitizer", "--version"),
            "torch": pytorch and pytorch["torch"],
        },
        "steps": ran,
        "profile": profile,
        "pytorch": pytorch,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = results / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [step["name"] for step in ran if step["status"]]
    print(f"\n{gpu}, driver {driver}: {len(ran) - len(failed)} steps passed, {len(failed)} failed")
    for name in failed:
        print(f"  FAILED: {name}")
    print(f"written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
