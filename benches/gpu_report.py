"""Puts together what benches/gpu.sh gathered in a folder: RESULTS/GPU.json and a summary on stdout.

    python3 benches/gpu_report.py LOGS RESULTS ECHOGRAD

Exit status: 0 if every step passed, 1 if not.
"""

import datetime
import json
import math
import re
import subprocess
import sys
from pathlib import Path

OUTPUT_LINES = 40
# An absolute path.
PATH = re.compile(r"(?<![\w./])~?/[\w.~+-][^\s:;,'\"()<>\[\]]*")
# Of the measured copy bandwidth; of PyTorch's time.
TARGETS = {"bandwidth": 0.85, "eager": 20.0, "compile": 4.0}


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


def pathless(text, echograd):
    """`text` with `echograd` for the program, and of other absolute paths the last part."""
    text = re.sub(rf"(?<![\w./-]){re.escape(echograd)}(?![\w./-])", "echograd", text)
    return PATH.sub(lambda path: path[0].rstrip("/").rsplit("/", 1)[-1], text)


def machine(found):
    """Of what `doctor --json` says: what results depend on, and no paths."""
    kept = {key: found.get(key) for key in ("version", "driver", "gpus", "kernels")} if found else {}
    kept["cuda"] = (found or {}).get("devices", {}).get("cuda")
    return kept


def document(logs, name):
    """The JSON that a step printed, or none."""
    try:
        return json.loads(read(logs / f"{name}.out"))
    except ValueError:
        return None


def steps(logs, echograd):
    """What ran, how it ended, and the end of what it said; of failed steps all streams."""
    found = []
    for line in read(logs / "steps").splitlines():
        name, status, seconds, command = line.split("\t", 3)
        texts = (pathless(read(logs / f"{name}.{stream}"), echograd) for stream in ("out", "err"))
        out, err = (text.strip().splitlines() for text in texts)
        step = {"name": name, "command": pathless(command, echograd), "status": int(status), "seconds": int(seconds)}
        if int(status):
            step["stdout"], step["stderr"] = out[-OUTPUT_LINES:], err[-OUTPUT_LINES:]
        elif name.startswith(("doctor", "profile", "pytorch")):
            if document(logs, name) is None:
                step["status"], step["stderr"] = 1, ["its output is no JSON"]
        else:
            step["stdout"] = out[-1:]
        found.append(step)
    return found


def compare(profile, pytorch, dtype):
    """The fused block against the copy bandwidth and PyTorch, as far as all were measured."""
    try:
        fused = next(p for p in profile["profiles"] if p["title"].startswith("fused"))
        # The faster of the two copies that were measured: the harder target.
        copy = max(profile["roof"]["copy_bytes_per_second"], 1e9 * pytorch["copy"]["gb_per_s"])
        masks, side, *_ = max((row["shape"] for row in fused["rows"]), key=math.prod)
        peer = next(b for b in pytorch["blocks"] if (b["dtype"], b["masks"], b["side"]) == (dtype, masks, side))
        found = {
            "masks": peer["masks"],
            "side": peer["side"],
            "seconds": fused["seconds"],
            "bandwidth": fused["bytes"] / fused["seconds"] / copy,
            "eager": 1e-3 * peer["eager_ms"] / fused["seconds"],
        }
        if "compile_ms" in peer:
            found["compile"] = 1e-3 * peer["compile_ms"] / fused["seconds"]
    except (KeyError, IndexError, StopIteration, TypeError, ZeroDivisionError):
        return None
    return found


def summary(ratios):
    texts = {
        "bandwidth": ("of the copy bandwidth", lambda x: f"{100 * x:.0f} %"),
        "eager": ("faster than PyTorch eager", lambda x: f"{x:.1f}×"),
        "compile": ("faster than torch.compile", lambda x: f"{x:.1f}×"),
    }
    for name, found in ratios.items():
        _, dtype, shape = name.split("_")
        if found is None:
            print(f"  feature block, {dtype}, {shape}: not measured")
            continue
        masks = f"{found['masks']} masks of {found['side']}²"
        print(f"  feature block, {dtype}, {masks}: {1e6 * found['seconds']:.0f} µs")
        for name, (text, show) in texts.items():
            if name in found:
                verdict = "met" if found[name] >= TARGETS[name] else "MISSED"
                print(f"    {show(found[name])} {text} (target {show(TARGETS[name])}: {verdict})")


def main():
    logs, results, echograd = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    gpu, driver, memory, clock = (word.strip() for word in read(logs / "gpu").splitlines()[0].split(","))
    ran = steps(logs, echograd)
    pytorch = document(logs, "pytorch")
    names = [step["name"] for step in ran if step["name"].startswith("profile_")]
    profiles = {name: document(logs, name) for name in names}
    # profile_DTYPE_N,H,W,C
    ratios = {name: compare(found, pytorch, name.split("_")[1]) for name, found in profiles.items()}
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": {"name": gpu, "driver": driver, "memory": memory, "max_sm_clock": clock},
        "versions": {
            "echograd": version(echograd, "--version"),
            "nvcc": version("nvcc", "--version"),
            "compute-sanitizer": version("compute-sanitizer", "--version"),
            "torch": pytorch and pytorch["torch"],
        },
        "machine": json.loads(pathless(json.dumps(machine(document(logs, "doctor"))), echograd)),
        "steps": ran,
        "ratios": ratios,
        "profiles": profiles,
        "pytorch": pytorch,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = results / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    failed = [step["name"] for step in ran if step["status"]]
    print(f"\n{gpu}, driver {driver}: {len(ran) - len(failed)} steps passed, {len(failed)} failed")
    for name in failed:
        print(f"  FAILED: {name}")
    summary(ratios)
    print(f"written to {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
