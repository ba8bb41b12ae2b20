#!/usr/bin/env python3
"""Compiles every kernel for several GPU generations, and looks at the machine code that comes out.

    python3 kernels/check.py                       # kernels/*.cu for sm_80, sm_90a, sm_120; the table in README.md
    python3 kernels/check.py --install target/nvcc # the same with the pinned compiler, installed there by pip
    python3 kernels/check.py --all --selftest      # every generation that build.rs embeds; kernels/selftest too
    python3 kernels/check.py --table               # writes the table instead of comparing it
    python3 kernels/check.py --kernel NAME         # instruction mix of one kernel, as a whole and of each loop
    python3 kernels/check.py --sass NAME           # its machine code between the source lines it comes from
    python3 kernels/check.py --nvrtc LIBNVRTC.so   # the sources through one or more run-time compilers
    python3 kernels/check.py --install target/nvcc --nvrtc # through the pinned one, installed there by pip

Needs no GPU and nothing beside Python. nvcc is that of --nvcc, ECHOGRAD_NVCC, CUDA_HOME or PATH, with
nvdisasm beside it, unless --install is given.

A kernel fails on any warning, on spilled registers or local memory (unless LOCAL_MEMORY below gives the
reason), and on floating-point atomics; one that is named after wgmma also without HGMMA on sm_90a, or where the
compiler has it wait more than it says. Exit status: 0 all is well; 1 a kernel fails, or the table is out of date;
2 the check could not run (usage, no compiler, no network).
"""

import argparse
import collections
import concurrent.futures
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
ROOT = KERNELS.parent
README = KERNELS / "README.md"

# nvcc's own requirements are unpinned, and newer PTX is refused by a driver of CUDA 13.0.
PACKAGES = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-nvdisasm==13.2.51",
]
# What these call themselves: the table is that of this compiler, read by this disassembler.
PINNED = ("V13.0.88", "V13.2.51")
# The oldest run-time compiler that the program uses (src/device/gpu/driver/compile.rs).
NVRTC = "nvidia-cuda-nvrtc-cu12==12.1.105"

FLAGS = "-std=c++17 -O3 -lineinfo -Xptxas -v -Werror all-warnings -cubin".split()
ARCHITECTURES = ["80", "90a", "120"]
ALL_ARCHITECTURES = ["75", "80", "86", "89", "90a", "100", "120"]
TABLE_ARCHITECTURE = "90a"

# Kernels that may use local memory (arrays with a computed index, spilled registers), each with the reason.
LOCAL_MEMORY = {}


class Problem(Exception):
    """The check could not run."""


def run(command, **options):
    try:
        return subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, **options)
    except OSError as e:
        raise Problem(f"{command[0]}: {e.strerror}") from None


# ---- The compiler ----


class Compiler:
    def __init__(self, nvcc):
        self.nvcc = Path(nvcc)
        self.nvdisasm = self.nvcc.with_name("nvdisasm")
        if not self.nvdisasm.is_file():
            self.nvdisasm = Path(shutil.which("nvdisasm") or self.nvdisasm)
        self.versions = tuple(self.version(tool) for tool in (self.nvcc, self.nvdisasm))

    @staticmethod
    def version(tool):
        answer = run([tool, "--version"])
        found = re.search(r"\bV\d+\.\d+\.\d+", answer.stdout)
        if answer.returncode or not found:
            raise Problem(f"{tool}: does not tell its version: {last_line(answer)}")
        return found[0]

    def architectures(self):
        answer = run([self.nvcc, "--list-gpu-code"])
        return set(re.findall(r"sm_(\d+)", answer.stdout))


def last_line(answer):
    lines = (answer.stderr + answer.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit status {answer.returncode}"


def find(path):
    """nvcc where --nvcc or the environment says it is."""
    if path is None:
        path = os.environ.get("ECHOGRAD_NVCC")
    if not path and os.environ.get("CUDA_HOME"):
        path = Path(os.environ["CUDA_HOME"], "bin", "nvcc")
    path = path or shutil.which("nvcc")
    if not path:
        raise Problem("no nvcc: give --nvcc PATH, set ECHOGRAD_NVCC or CUDA_HOME, or --install DIR")
    if not Path(path).is_file():
        raise Problem(f"{path}: no nvcc there")
    return Compiler(path)


def install(folder):
    """The pinned compiler in a virtual environment, made unless it is there already."""
    folder = Path(folder).resolve()

    def installed():
        found = sorted(folder.glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc"))
        if found and found[0].with_name("nvdisasm").is_file():
            compiler = Compiler(found[0])
            return compiler if compiler.versions == PINNED else None
        return None

    try:
        compiler = installed()
    except Problem:  # left half-installed
        compiler = None
    if compiler:
        return compiler
    pip_install(folder, PACKAGES)
    compiler = installed()
    if not compiler:
        raise Problem(f"{folder}: installed, but not nvcc and nvdisasm of versions {' and '.join(PINNED)}")
    return compiler


def install_nvrtc(folder):
    """The pinned run-time compiler in a virtual environment of its own under `folder`: its path."""
    folder = Path(folder).resolve() / NVRTC
    pattern = "lib/python3*/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.*"
    if not any(folder.glob(pattern)):
        pip_install(folder, [NVRTC])
    found = [path for path in folder.glob(pattern) if ".alt." not in path.name]
    if not found:
        raise Problem(f"{folder}: installed, but no libnvrtc")
    return found[0]


def pip_install(folder, packages):
    """A new virtual environment with these packages."""
    print(f"installing {' '.join(packages)} in {folder}", flush=True)
    made = run([sys.executable, "-m", "venv", "--clear", folder])
    if made.returncode:
        raise Problem(f"{folder}: cannot make a virtual environment (python3-venv missing?): {last_line(made)}")
    command = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    answer = run([*command, "--retries", "2", "--timeout", "20", *packages])
    if answer.returncode:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[0] if errors else last_line(answer)
        raise Problem(f"pip could not install it; without a network, give its path instead: {why}")


# ---- Compilation ----


class Resources:
    """What ptxas says about one kernel."""

    def __init__(self):
        self.registers = self.shared = self.stack = self.spilled = 0


def compile_file(compiler, source, arch, folder):
    """Compiles one file for one architecture: its complaints, resources per kernel, and the cubin's path."""
    cubin = Path(folder, f"{source.parent.name}-{source.stem}-{arch}.cubin")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    answer = run([compiler.nvcc, *FLAGS, target, "-o", cubin, source.relative_to(ROOT)], cwd=ROOT)
    name = f"{source.relative_to(ROOT)}, sm_{arch}"
    text = answer.stdout + answer.stderr
    complaints = [f"{name}: {line}" for line in text.splitlines() if re.search(r"\b(warning|error|fatal)\b.*:", line)]
    # What ptxas says of wgmma, as information: that it waits where the kernel does not.
    if source.parent == KERNELS:
        complaints += [f"{name}: {line}" for line in text.splitlines() if re.search(r"\(C75\d\d\)", line)]
    if answer.returncode and not complaints:
        complaints = [f"{name}: nvcc failed: {last_line(answer)}"]
    resources = {}
    current = None
    for line in text.splitlines():
        if found := re.search(r"(?:Function properties for|Compiling entry function) '?([\w$]+)", line):
            current = resources.setdefault(found[1], Resources())
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack = int(found[1])
            current.spilled = int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            current.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
    return complaints, resources, cubin


# ---- Machine code ----

FP32 = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "FCHK"}
FP32 |= {"FADD32I", "FMUL32I", "FFMA32I", "FSWZADD"}
FP64 = {"DADD", "DMUL", "DFMA", "DMNMX", "DSET", "DSETP"}
CONVERT = {"F2F", "F2I", "I2F", "F2FP", "I2FP", "FRND"}
MATRIX = {"HMMA", "IMMA", "BMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA"}
SYNCHRONISE = {"BAR"}
LOCAL = {"LDL", "STL"}
FLOAT_ATOMIC = re.compile(r"(RED|ATOM|ATOMG|ATOMS|REDG|REDS|UREDG)\..*\bB?F(16|32|64)")

Instruction = collections.namedtuple("Instruction", "address name modifiers line text target")


class Function:
    """The instructions of one kernel, and where its labels point."""

    def __init__(self):
        self.code = []
        self.labels = {}

    def trimmed(self):
        """Without the branch to itself and the NOPs that follow the last instruction."""
        code = list(self.code)
        while code and (code[-1].name == "NOP" or self.labels.get(code[-1].target) == code[-1].address):
            code.pop()
        return code

    def loops(self):
        """Address ranges from the target of a backward branch to that branch, outer loops first."""
        found = {}
        for instruction in self.trimmed():
            start = self.labels.get(instruction.target)
            if start is not None and start < instruction.address:
                found[start] = max(found.get(start, 0), instruction.address)
        return sorted(found.items(), key=lambda span: (span[0], -span[1]))


def disassemble(compiler, cubin):
    """The functions of a cubin by name."""
    answer = run([compiler.nvdisasm, "-c", "-g", cubin])
    if answer.returncode:
        raise Problem(f"nvdisasm: {last_line(answer)}")
    functions = {}
    function = line = None
    waiting = []
    for text in answer.stdout.splitlines():
        if found := re.match(r"\.text\.([\w$]+):", text):
            function = functions.setdefault(found[1], Function())
            line, waiting = None, []
        elif text.lstrip().startswith(".section"):
            function = None
        elif function is None:
            continue
        elif found := re.match(r"([.$\w]+):", text):
            waiting.append(found[1])
        elif found := re.search(r'//## File "(.*)", line (\d+)', text):
            line = (found[1], int(found[2]))
        elif found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)(\.[^\s;]*)?", text):
            address = int(found[1], 16)
            for label in waiting:
                function.labels[label] = address
            waiting = []
            target = re.search(r"`\(([^)]+)\)", text) if found[2] in ("BRA", "BRX") else None
            instruction = text.split("*/", 1)[1].rstrip(" ;")
            target = target[1] if target else None
            function.code.append(Instruction(address, found[2], found[3] or "", line, instruction, target))
    return functions


def width(instruction):
    """Bits that each lane moves."""
    found = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", instruction.modifiers)
    return int(found[1]) if found else 32


def kind(instruction):
    """The column that an instruction is counted in."""
    name = instruction.name
    if name in FP32:
        return "FFMA" if name.startswith("FFMA") else "fp32"
    if name in FP64:
        return "fp64"
    if name in MATRIX:
        return "MMA"
    if name in CONVERT:
        return "convert"
    if name in SYNCHRONISE:
        return "BAR"
    if name in LOCAL:
        return "local"
    if name in ("LDS", "LDSM"):
        return "LDS"
    if name in ("STS", "STSM"):
        return "STS"
    if name in ("MUFU", "LDG", "STG", "LDGSTS", "SHFL"):
        return name
    if name.startswith(("ATOM", "RED")) and name != "REDUX":
        return "atomic"
    return "other"


def mix(code):
    counts = collections.Counter(kind(instruction) for instruction in code)
    widths = {"LDG": collections.Counter(), "STG": collections.Counter()}
    for instruction in code:
        if instruction.name in widths:
            widths[instruction.name][width(instruction)] += 1
    return counts, widths


def by_width(widths):
    """3×128 1×32: three accesses of 128 bits by each lane and one of 32."""
    return " ".join(f"{count}×{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "·"


# ---- What is done with them ----

COLUMNS = ["FFMA", "fp32", "fp64", "MUFU", "convert", "LDG", "STG", "LDS", "STS", "LDGSTS", "SHFL", "BAR", "MMA"]
COLUMNS += ["atomic", "other"]
BEGIN = "<!-- kernels: written by check.py --table -->"
END = "<!-- kernels: end -->"


def cells(code):
    counts, widths = mix(code)
    return [by_width(widths[c]) if c in widths else str(counts[c] or "·") for c in COLUMNS]


def table(results):
    """Markdown, one row per kernel."""
    head = ["kernel", "registers", "shared B", "local B", "instructions", *COLUMNS]
    rows = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for source in sorted(results):
        rows.append(f"| **{source.name}** |" + " |" * (len(head) - 1))
        resources, functions = results[source]
        for name in sorted(functions):
            code, used = functions[name].trimmed(), resources[name]
            local = used.stack or used.spilled
            row = [name, used.registers, used.shared or "·", local or "·", len(code), *cells(code)]
            rows.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(rows)


def readme_parts():
    text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise Problem(f"{README.relative_to(ROOT)}: the lines '{BEGIN}' and '{END}' must occur once")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    return before, old.strip(), after


def check_table(compiler, results, write):
    """Writes the table, or compares it: the complaints."""
    new = table(results)
    before, old, after = readme_parts()
    if compiler.versions != PINNED:
        if write:
            raise Problem(f"--table needs nvcc {PINNED[0]} and nvdisasm {PINNED[1]}, found {compiler.versions}")
        print(f"table not compared: it is of nvcc {PINNED[0]} and nvdisasm {PINNED[1]}, found {compiler.versions}")
        return []
    if write:
        README.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}", encoding="utf-8")
        return []
    if old == new:
        return []
    have, want = set(old.splitlines()), new.splitlines()
    first = next((line for line in want if line not in have), "a row too many")
    where = README.relative_to(ROOT)
    return [f"{where}: the table is out of date, run kernels/check.py --table; first difference: {first}"]


def inspect(source, arch, resources, functions):
    """Complaints about the machine code of one file."""
    complaints = []
    for name, used in resources.items():
        where = f"{source.relative_to(ROOT)}, sm_{arch}, {name}"
        local = used.stack or used.spilled or any(kind(i) == "local" for i in functions[name].code)
        if local and name not in LOCAL_MEMORY:
            sizes = f"a stack of {used.stack} bytes, {used.spilled} bytes of spilled registers moved"
            complaints.append(f"{where}: local memory: {sizes}")
        if "_wgmma_" in name and arch == "90a" and not any(i.name == "HGMMA" for i in functions[name].code):
            complaints.append(f"{where}: no HGMMA")
        for instruction in functions[name].code:
            if FLOAT_ATOMIC.match(instruction.name + instruction.modifiers):
                text = f"{instruction.name}{instruction.modifiers}"
                complaints.append(f"{where}: a floating-point atomic, whose sum depends on the order: {text}")
    return complaints


def show_mix(name, used, function):
    code = function.trimmed()
    print(f"{name}, sm_{TABLE_ARCHITECTURE}: {used.registers} registers, {used.shared} bytes of static shared memory,")
    print(f"{used.stack} bytes of local memory; instructions as they stand in the code, not as often as they run")
    spans = [("whole kernel", code)]
    for start, end in function.loops():
        body = [i for i in code if start <= i.address <= end]
        lines = [i.line for i in body if i.line and not i.line[0].endswith(".cuh")] or [i.line for i in body if i.line]
        where = f"{Path(lines[0][0]).name}:{min(n for f, n in lines if f == lines[0][0])}" if lines else ""
        spans.append((f"loop {start:04x}-{end:04x} {where}", body))
    for title, body in spans:
        print(f"\n{title}: {len(body)} instructions")
        print("  " + ", ".join(f"{c} {v}" for c, v in zip(COLUMNS, cells(body)) if v != "·"))
        names = collections.Counter(i.name + (i.modifiers if i.name == "MUFU" else "") for i in body)
        print("  " + " ".join(f"{n}:{count}" for n, count in names.most_common()))


def show_code(function):
    sources = {}
    previous = None
    labels = {address: name for name, address in function.labels.items()}
    for instruction in function.trimmed():
        if instruction.line and instruction.line != previous:
            previous = path, number = instruction.line
            if path not in sources:
                sources[path] = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []
            known = number <= len(sources[path])
            text = sources[path][number - 1].strip() if known else ""
            print(f"// {Path(path).name}:{number}  {text}")
        if instruction.address in labels:
            print(f"{labels[instruction.address]}:")
        print(f"    {instruction.address:04x} {instruction.text.strip()}")


# ---- NVRTC ----


def nvrtc_file(library, source, arches):
    """One file through a run-time compiler: its version, the architectures tried, its complaints."""
    builtins = sorted(Path(library).parent.glob("libnvrtc-builtins*.so*"))
    for found in builtins:  # NVRTC opened by path does not look beside itself
        if ".alt." not in found.name:
            ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(library))

    def call(function, *arguments):
        status = getattr(nvrtc, function)(*arguments)
        if status:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise OSError(f"{function}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    call("nvrtcGetSupportedArchs", known)
    headers = sorted(KERNELS.glob("*.cuh"))
    # Kernels include them as "device.cuh", those of selftest/ as "../device.cuh".
    names = [prefix + header.name for header in headers for prefix in ("", "../")]
    texts = [header.read_bytes() for header in headers for _ in range(2)]
    strings = ctypes.c_char_p * len(names)
    complaints, tried = [], []
    for arch in arches:
        if int(arch.rstrip("a")) not in known:
            continue
        tried.append(arch)
        program = ctypes.c_void_p()
        call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.read_bytes(),
            str(source.relative_to(ROOT)).encode(),
            len(names),
            strings(*texts),
            strings(*(name.encode() for name in names)),
        )
        # sm_ and not compute_: the PTX goes through this version's ptxas as well.
        options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--generate-line-info"]
        # As in src/device/gpu/driver/compile.rs.
        options.append("--device-as-default-execution-space")
        status = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        )
        size = ctypes.c_size_t()
        call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        call("nvrtcGetProgramLog", program, log)
        text = log.value.decode().strip()
        if status or text:
            complaints.append(f"sm_{arch}: {text.splitlines()[0] if text else 'failed without a word'}")
        call("nvrtcDestroyProgram", ctypes.byref(program))
    return f"{major.value}.{minor.value}", tried, complaints


def check_nvrtc(libraries, sources, arches, jobs):
    failures = 0
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for library in libraries:
            if not Path(library).is_file():
                raise Problem(f"{library}: no such file")
            tasks = {pool.submit(nvrtc_file, library, source, arches): source for source in sources}
            version, tried, failed = "", [], 0
            for task, source in tasks.items():
                try:
                    version, tried, complaints = task.result()
                except (OSError, AttributeError) as e:
                    raise Problem(f"{library}: {e}") from None
                failed += bool(complaints)
                for complaint in complaints:
                    print(f"error: NVRTC {version}: {source.relative_to(ROOT)}, {complaint}", file=sys.stderr)
            passed = f"{len(sources) - failed} of {len(sources)} files compile without a message"
            print(f"NVRTC {version}: {passed} for sm_{', '.join(tried)}")
            failures += failed
    return failures


# ---- Main ----


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--nvcc", metavar="PATH", help="the compiler")
    which.add_argument("--install", metavar="DIR", help="use the pinned compiler in DIR, installed by pip if missing")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--arch", metavar="LIST", help=f"GPU generations, {','.join(ARCHITECTURES)} by default")
    targets.add_argument("--all", action="store_true", help=f"that is {','.join(ALL_ARCHITECTURES)}")
    parser.add_argument("--selftest", action="store_true", help="compile kernels/selftest too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compilations at a time")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--table", action="store_true", help="write the table into kernels/README.md")
    action.add_argument("--kernel", metavar="NAME", help="print the instruction mix of one kernel")
    action.add_argument("--sass", metavar="NAME", help="print the machine code of one kernel")
    action.add_argument(
        "--nvrtc", metavar="LIB", nargs="*", help="compile with these libnvrtc.so instead, or the one that --install installs"
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, found {args.jobs}")
    if args.nvrtc is not None and bool(args.nvrtc) == bool(args.install):
        parser.error("--nvrtc: expected paths, or none and --install DIR")
    return args


def show(compiler, args, sources, folder):
    """--kernel and --sass."""
    name = args.kernel or args.sass
    # The declaration may be made by a macro, so the text need not contain the name: likely files first.
    sources = sorted(sources, key=lambda s: (not name.startswith(s.stem), s))
    for source in sources:
        complaints, resources, cubin = compile_file(compiler, source, TABLE_ARCHITECTURE, folder)
        if complaints:
            raise Problem(complaints[0])
        if name in resources:
            function = disassemble(compiler, cubin)[name]
            show_mix(name, resources[name], function) if args.kernel else show_code(function)
            return
    raise Problem(f"{name}: no kernel of this name in {', '.join(str(s.relative_to(ROOT)) for s in sources)}")


def check(compiler, args, sources, arches, folder):
    """The complaints of all files and architectures."""
    complaints, results, seen, kernels = [], {}, set(), 0
    jobs = [(source, arch) for source in sources for arch in arches]

    def one(job):
        source, arch = job
        failures, resources, cubin = compile_file(compiler, source, arch, folder)
        functions = {} if failures else disassemble(compiler, cubin)
        if not failures:
            failures = inspect(source, arch, resources, functions)
        return failures, resources, functions

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for (source, arch), (failures, resources, functions) in zip(jobs, pool.map(one, jobs)):
            complaints += failures
            kernels += len(functions)
            seen |= {name for name, used in resources.items() if used.stack or used.spilled}
            if arch == TABLE_ARCHITECTURE and source.parent == KERNELS:
                results[source] = (resources, functions)
    compiled = f"{kernels} kernels of {len(sources)} files for sm_{', '.join(arches)}"
    print(f"nvcc {compiler.versions[0]}: {compiled}")
    if complaints:
        return complaints
    if TABLE_ARCHITECTURE in arches:
        complaints += check_table(compiler, results, args.table)
    if set(arches) >= set(ARCHITECTURES):
        for name in sorted(set(LOCAL_MEMORY) - seen):
            complaints.append(f"kernels/check.py: LOCAL_MEMORY excuses {name}, which does not need it")
    return complaints


def main():
    args = arguments()
    arches = ALL_ARCHITECTURES if args.all or (args.nvrtc is not None and not args.arch) else ARCHITECTURES
    if args.arch:
        arches = [word.strip() for word in args.arch.split(",")]
        wrong = [word for word in arches if not re.fullmatch(r"\d{2,3}[af]?", word)]
        if wrong:
            raise Problem(f"--arch: expected numbers like 80 or 90a, found '{wrong[0]}'")
    if args.table and TABLE_ARCHITECTURE not in arches:
        raise Problem(f"--table: the table is of sm_{TABLE_ARCHITECTURE}, which --arch leaves out")
    sources = sorted(KERNELS.glob("*.cu"))
    if args.selftest or args.kernel or args.sass:
        sources += sorted(KERNELS.glob("selftest/*.cu"))
    if args.nvrtc is not None:
        libraries = args.nvrtc or [install_nvrtc(args.install)]
        return 1 if check_nvrtc(libraries, sources, arches, args.jobs) else 0
    compiler = install(args.install) if args.install else find(args.nvcc)
    unknown = [arch for arch in arches if arch.rstrip("af") not in compiler.architectures()]
    if unknown:
        raise Problem(f"nvcc {compiler.versions[0]} does not know sm_{', sm_'.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        if args.kernel or args.sass:
            show(compiler, args, sources, folder)
            return 0
        complaints = check(compiler, args, sources, arches, folder)
    for complaint in complaints:
        print(f"error: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        sys.exit(0)
