"""Puts together what benches/gpu.sh gathered in a folder so far: RESULTS/GPU.json and a summary on stdout.

    python3 benches/gpu_report.py LOGS RESULTS ECHOGRAD

Exit status: 0 if every step passed, 1 if one failed or was left out.
"""

import csv
import datetime
import io
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
# Of PyTorch's time and of the memory that it reserves, at batch 64.
STEP_TARGETS = {"eager": 3.0, "compile": 1.5, "memory": 0.6}
# Of cuDNN's time, from so many channels on, both ways.
CONV_TARGET, CONV_CHANNELS = 1.15, 128
# Of an epoch without its validation.
BUSY_TARGET = 0.95
JSON_STEPS = ("doctor", "profile", "pytorch", "summary", "step", "conv", "validation", "external")


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


def documents(logs, names, *prefixes):
    """The JSON of the steps whose names begin so."""
    found = (document(logs, name) for name in names if name.startswith(prefixes))
    return [each for each in found if each]


def steps(logs, echograd):
    """What ran, how it ended last, and the end of what it said; of failed steps all streams."""
    found = {}
    for line in read(logs / "steps").splitlines():
        name, status, seconds, command = line.split("\t", 3)
        step = {"name": name, "command": pathless(command, echograd)}
        found.pop(name, None)
        found[name] = step
        if status == "skipped":
            step["status"] = status
            continue
        texts = (pathless(read(logs / f"{name}.{stream}"), echograd) for stream in ("out", "err"))
        out, err = (text.strip().splitlines() for text in texts)
        step |= {"status": int(status), "seconds": int(seconds)}
        if step["status"]:
            step["stdout"], step["stderr"] = out[-OUTPUT_LINES:], err[-OUTPUT_LINES:]
        elif name.startswith(JSON_STEPS):
            if document(logs, name) is None:
                step["status"], step["stderr"] = 1, ["its output is no JSON"]
        else:
            step["stdout"] = out[-1:]
    return list(found.values())


def together(found, rows, key):
    """One document of several: that of the first, the rows of all, those alike by `key` in one."""
    if not found:
        return None
    merged = {}
    for row in (row for each in found for row in each[rows]):
        merged.setdefault(key(row), {}).update(row)
    errors = [error for each in found for error in each["errors"]]
    return found[0] | {rows: list(merged.values()), "errors": errors}


def compare(profile, pytorch, dtype):
    """The fused block against the copy bandwidth and PyTorch, as far as they were measured."""
    try:
        fused = next(p for p in profile["profiles"] if p["title"].startswith("fused"))
        copy = profile["roof"]["copy_bytes_per_second"]
        if pytorch:
            # The faster of the two copies that were measured: the harder target.
            copy = max(copy, 1e9 * pytorch["copy"]["gb_per_s"])
        masks, side, *_ = max((row["shape"] for row in fused["rows"]), key=math.prod)
        found = {
            "masks": masks,
            "side": side,
            "seconds": fused["seconds"],
            "bandwidth": fused["bytes"] / fused["seconds"] / copy,
        }
    except (KeyError, IndexError, StopIteration, TypeError, ZeroDivisionError):
        return None
    rows = (pytorch or {}).get("blocks", [])
    peer = next((b for b in rows if (b["dtype"], b["masks"], b["side"]) == (dtype, masks, side)), {})
    for variant in ("eager", "compile"):
        if f"{variant}_ms" in peer:
            found[variant] = 1e-3 * peer[f"{variant}_ms"] / fused["seconds"]
    return found


def whole_step(profile, pytorch, layers, summary):
    """A training step against PyTorch's, its time against the sum of its steps' times at the roof, and the same network on
    both sides."""
    try:
        ours = profile["profiles"][0]
        batch, side, *_ = max((row["shape"] for row in ours["rows"]), key=lambda s: (s[1], s[0]))
        network = "efficientnet-b1" if "efficientnet-b1" in ours["title"] else "unet"
        found = {
            "network": network,
            "batch": batch,
            "size": side,
            "seconds": float(ours["graph_seconds"]),
            "least_seconds": sum(row["seconds"] * row["roofline"] for row in ours["rows"]),
            "launch_by_launch_seconds": ours["seconds"],
            "bytes": ours["arena_bytes"],
            "kernels": sum(len(row["kernels"]) for row in ours["rows"]),
        }
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    rows = (pytorch or {}).get("steps", [])
    peer = next((r for r in rows if (r["network"], r["batch"], r["size"]) == (network, batch, side)), {})
    for variant in ("eager", "compile"):
        if variant in peer:
            found[variant] = 1e-3 * peer[variant]["ms"] / found["seconds"]
            if peer[variant].get("reserved_bytes"):
                # Against the variant that needs less.
                share = found["bytes"] / peer[variant]["reserved_bytes"]
                found["memory"] = max(found.get("memory", 0.0), share)
    if "eager" in peer and summary:
        # The prior's five learned numbers are no part of the network.
        found["same_network"] = summary["parameters"] == peer["eager"]["parameters"]
    if layers and layers["layers"]:
        wide = [
            layer["ours_ms"] / layer["cudnn_ms"]
            for layer in layers["layers"]
            if layer["groups"] == 1 and layer["w"][1] == 3 and "ours_ms" in layer
            and min(layer["x"][3], layer["y"][3]) >= CONV_CHANNELS
        ]
        total = [[layer[key] * layer["steps"] for layer in layers["layers"]] for key in ("ours_ms", "cudnn_ms")]
        found["convolutions"] = sum(total[0]) / sum(total[1])
        found["wide_convolutions"] = sorted(wide)
    return found


def operations(profile):
    """Sums over the steps of each operation, slowest first."""
    try:
        sums = {}
        for row in profile["profiles"][0]["rows"]:
            found = sums.setdefault(row["operation"], dict.fromkeys(("steps", "seconds", "least_seconds", "bytes", "flops"), 0))
            found["steps"] += 1
            found["least_seconds"] += row["seconds"] * row["roofline"]
            for key in ("seconds", "bytes", "flops"):
                found[key] += row[key]
    except (KeyError, IndexError, TypeError):
        return None
    return dict(sorted(sums.items(), key=lambda item: -item[1]["seconds"]))


def training(logs, steps):
    """The run's curve and validation, the external test, and the share of an epoch's training in which the GPU was busy with
    steps."""
    curve = list(csv.DictReader(io.StringIO(read(logs / "curve.out"))))
    if not curve:
        return None
    curve = [{k: float(v) if v else None for k, v in row.items()} for row in curve]
    found = {"curve": curve, "validation": document(logs, "validation"), "external": document(logs, "external")}
    step = steps.get("step_efficientnet-b1_16")
    if step:
        per_epoch = curve[0]["step"]
        # The first epoch contains loading; the last half is the steady state.
        late = curve[len(curve) // 2 :]
        # Validation is no training, and steps do not run in it: judged without, and told with it.
        for name, taken in (("busy", lambda r: r["seconds"] - r["validation_seconds"]), ("busy_with_validation", lambda r: r["seconds"])):
            found[name] = per_epoch * step["seconds"] / sorted(map(taken, late))[len(late) // 2]
    return found


def summary_of_steps(steps):
    def verdict(met):
        return "met" if met else "MISSED"

    for name, found in steps.items():
        if found is None:
            print(f"  training step, {name}: not measured")
            continue
        wgmma = ", wgmma" if name.startswith("wgmma_") else ""
        where = f"{found['network']}, batch {found['batch']}, {found['size']}²{wgmma}"
        print(
            f"  training step, {where}: {1e3 * found['seconds']:.2f} ms, {found['bytes'] >> 20} MiB,"
            f" {found['kernels']} kernels; at the roof {1e3 * found['least_seconds']:.2f} ms"
        )
        for variant, of in (("eager", "PyTorch eager"), ("compile", "torch.compile")):
            if variant in found:
                ratio, target = found[variant], STEP_TARGETS[variant]
                print(f"    {ratio:.2f}× faster than {of} (target {target:.1f}×: {verdict(ratio >= target)})")
        if "memory" in found:
            ratio, target = found["memory"], STEP_TARGETS["memory"]
            judged = f" (target {target:.1f}: {verdict(ratio <= target)})" if found["batch"] == 64 else ""
            print(f"    {ratio:.2f} of PyTorch's memory{judged}")
        if not found.get("same_network", True):
            print("    NOT THE SAME NETWORK: the numbers of parameters differ")
        if "convolutions" in found:
            print(f"    convolutions {found['convolutions']:.2f} of cuDNN's time")
            wide = found["wide_convolutions"]
            if wide:
                within = sum(ratio <= CONV_TARGET for ratio in wide)
                print(f"    {within} of {len(wide)} 3×3 layers from {CONV_CHANNELS} channels on within {CONV_TARGET:.2f} of cuDNN")


def summary_of_training(found):
    if found is None:
        print("  training run: not measured")
        return
    last = found["curve"][-1]
    scores = ", ".join(f"{k} {last[k]:.3f}" for k in ("loss", "val_dice", "val_auc") if last.get(k) is not None)
    print(f"  training run: {len(found['curve'])} epochs, {last['seconds']:.1f} s the last; {scores}")
    if "busy" in found:
        verdict = "met" if found["busy"] >= BUSY_TARGET else "MISSED"
        print(f"    GPU busy with steps {100 * found['busy']:.0f} % of an epoch's training (target {100 * BUSY_TARGET:.0f} %: {verdict}),"
              f" {100 * found['busy_with_validation']:.0f} % with its validation")
    for name, metrics in (found["external"] or {}).items():
        dice, auc = metrics.get("segmentation", {}).get("dice", {}), metrics.get("classification", {}).get("auc", {})
        print(f"    external test on {name}: Dice {dice.get('mean')}, AUC {auc.get('value')}")


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
    every = [step["name"] for step in ran]
    blocks = documents(logs, [name for name in every if not name.startswith("pytorch_step")], "pytorch")
    pytorch = together(blocks, "blocks", lambda row: (row["dtype"], row["masks"], row["side"]))
    whole = documents(logs, every, "pytorch_step")
    pytorch_steps = together(whole, "steps", lambda row: (row["network"], row["batch"], row["size"]))
    names = [name for name in every if name.startswith("profile_")]
    profiles = {name: document(logs, name) for name in names}
    # profile_DTYPE_N,H,W,C
    ratios = {name: compare(found, pytorch, name.split("_")[1]) for name, found in profiles.items()}
    profiled = [name for name in every if name.startswith(("step_", "wgmma_"))]
    convolutions = {name: document(logs, f"conv_{name[5:]}") for name in profiled if name.startswith("step_")}
    steps_found = {
        name: whole_step(
            document(logs, name),
            pytorch_steps,
            convolutions.get(name),
            document(logs, f"summary_{name.split('_')[1]}"),
        )
        for name in profiled
    }
    run = training(logs, {name: found for name, found in steps_found.items() if found})
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
        "training_steps": steps_found,
        "training_step_operations": {name: operations(document(logs, name)) for name in profiled},
        "convolutions": convolutions,
        "pytorch_steps": pytorch_steps,
        "training": run,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = results / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    skipped = [step["name"] for step in ran if step["status"] == "skipped"]
    failed = [step["name"] for step in ran if step["status"] not in (0, "skipped")]
    passed = len(ran) - len(failed) - len(skipped)
    print(f"\n{gpu}, driver {driver}: {passed} steps passed, {len(failed)} failed, {len(skipped)} left out")
    for name in failed:
        print(f"  FAILED: {name}")
    if skipped:
        print(f"  left out: {', '.join(skipped)}")
    summary(ratios)
    summary_of_steps(steps_found)
    summary_of_training(run)
    print(f"written to {path}")
    return 1 if failed or skipped else 0


if __name__ == "__main__":
    sys.exit(main())
