//! Kernels compiled at first use by NVRTC, the run-time compiler, and kept on disk.
//!
//! The library is looked for in `ECHOGRAD_NVRTC` (the file, its folder, or a folder into which pip
//! installed packages), then where the system looks for libraries, then in the toolkit's folder. What it
//! makes is kept in `ECHOGRAD_CACHE` or the user's cache folder; files there may be deleted at any time.

use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::{env, fs, ptr};

use libloading::Library;
use sha2::{Digest, Sha256};

use super::library::problem;
use crate::device::code::HEADERS;
use crate::error::Result;

/// First bytes of a file in the cache; the digest of the rest follows, then the code.
const MAGIC: &[u8] = b"echograd kernels 1\n";
const DIGEST: usize = 32;

type Program = *mut c_void;

macro_rules! library {
    ($($field:ident = $symbol:literal: ($($argument:ty),*)),* $(,)?) => {
        /// NVRTC, loaded.
        pub(crate) struct Nvrtc {
            $($field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// Its version.
            pub(crate) version: (u32, u32),
            /// Where it is, or the name by which the system found it.
            pub(crate) path: PathBuf,
        }

        impl Nvrtc {
            /// # Safety
            /// The library is NVRTC.
            unsafe fn bind(library: Library, path: PathBuf) -> Option<Self> {
                // SAFETY: the types are those of its header.
                $(let $field = unsafe {
                    *library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($symbol.as_bytes()).ok()?
                };)*
                // Never unloaded: the functions stay where they are, and compilers leave threads' data.
                std::mem::forget(library);
                let mut nvrtc = Self { $($field,)* version: (0, 0), path };
                let (mut major, mut minor) = (0, 0);
                // SAFETY: two integers to be written.
                let answer = unsafe { (nvrtc.version_of)(&raw mut major, &raw mut minor) };
                nvrtc.version = (major.max(0) as u32, minor.max(0) as u32);
                (answer == 0).then_some(nvrtc)
            }
        }
    };
}

library! {
    version_of = "nvrtcVersion": (*mut c_int, *mut c_int),
    count = "nvrtcGetNumSupportedArchs": (*mut c_int),
    architectures = "nvrtcGetSupportedArchs": (*mut c_int),
    create = "nvrtcCreateProgram": (*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char),
    destroy = "nvrtcDestroyProgram": (*mut Program),
    compile = "nvrtcCompileProgram": (Program, c_int, *const *const c_char),
    log_size = "nvrtcGetProgramLogSize": (Program, *mut usize),
    log = "nvrtcGetProgramLog": (Program, *mut c_char),
    cubin_size = "nvrtcGetCUBINSize": (Program, *mut usize),
    cubin = "nvrtcGetCUBIN": (Program, *mut c_char),
    ptx_size = "nvrtcGetPTXSize": (Program, *mut usize),
    ptx = "nvrtcGetPTX": (Program, *mut c_char),
}

/// Oldest that is used. The one before knows sm_90a too, but crashes, and the program with it, on kernels with lambdas.
const OLDEST: (u32, u32) = (12, 1);

/// How to get it, for whoever has none.
const HOW: &str = "install it with `pip install nvidia-cuda-nvrtc` and set ECHOGRAD_NVRTC to pip's folder, or \
    build echograd where nvcc is";

impl Nvrtc {
    /// The first NVRTC that makes code for drivers of CUDA `driver`, or for any.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if there is none, or none but too new or too old ones.
    pub(crate) fn find(driver: Option<(u32, u32)>) -> Result<Self> {
        let mut other = None;
        let wanted = env::var_os("ECHOGRAD_NVRTC").filter(|value| !value.is_empty());
        for path in places(wanted.as_ref()) {
            match Self::open(&path) {
                Some(nvrtc) if driver.is_some_and(|d| nvrtc.version.0 > d.0) => {
                    other = Some((nvrtc, "newer than the driver".to_owned()));
                }
                Some(nvrtc) if nvrtc.version < OLDEST => {
                    let why = format!("older than {}.{}", OLDEST.0, OLDEST.1);
                    other = Some((nvrtc, why));
                }
                Some(nvrtc) => return Ok(nvrtc),
                None => {}
            }
        }
        let cuda = driver.map_or(String::new(), |d| format!(" of CUDA {}", d.0));
        Err(problem(match (other, wanted) {
            (Some((nvrtc, why)), _) => format!(
                "{} is of CUDA {}.{}, {why}; one{cuda} is needed",
                nvrtc.path.display(),
                nvrtc.version.0,
                nvrtc.version.1
            ),
            (None, Some(path)) => format!("no libnvrtc at {} (ECHOGRAD_NVRTC)", path.display()),
            (None, None) => format!("no NVRTC (libnvrtc){cuda} to compile kernels with; {HOW}"),
        }))
    }

    /// Opens the library of that path or name, unless it is something else.
    pub(crate) fn open(path: &Path) -> Option<Self> {
        // NVRTC asks the system for its builtins, which does not look beside it; a library that is
        // loaded already is found.
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let builtins = folder.map(|folder| libraries(folder, "nvrtc-builtins"));
        let builtins = builtins.into_iter().flatten();
        // SAFETY: libraries of the CUDA toolkit, whose initialisers have no demands.
        unsafe {
            builtins
                .filter_map(|path| Library::new(path).ok())
                .for_each(std::mem::forget);
            let library = Library::new(path).ok()?;
            Self::bind(library, path.to_owned())
        }
    }

    /// The architectures that it compiles for, `90` for compute capability 9.0, ascending.
    fn known(&self) -> Vec<u32> {
        let mut count = 0;
        // SAFETY: an integer to be written; then as many as were announced.
        unsafe {
            if (self.count)(&raw mut count) != 0 {
                return Vec::new();
            }
            let mut known = vec![0; count.max(0) as usize];
            if (self.architectures)(known.as_mut_ptr()) != 0 {
                return Vec::new();
            }
            known.sort_unstable();
            known.into_iter().map(|a| a.max(0) as u32).collect()
        }
    }

    /// What to compile for: the GPU's own machine code; that of an older one of the same generation,
    /// which runs as well; else PTX of the newest older generation, which the driver translates.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if it knows no GPU as old.
    pub(crate) fn architecture(&self, capability: (u32, u32)) -> Result<String> {
        let wanted = capability.0 * 10 + capability.1;
        let best = self.known().into_iter().rfind(|&known| known <= wanted);
        match best {
            // The instructions of Hopper alone, such as wgmma.
            Some(90) if wanted == 90 => Ok("sm_90a".to_owned()),
            Some(best) if best / 10 == capability.0 => Ok(format!("sm_{best}")),
            Some(best) => Ok(format!("compute_{best}")),
            None => Err(problem(format!(
                "NVRTC {}.{} compiles for no GPU of compute capability {}.{}",
                self.version.0, self.version.1, capability.0, capability.1
            ))),
        }
    }

    /// Compiles one file, to machine code if `architecture` begins with `sm_`, else to PTX.
    ///
    /// # Errors
    /// [`crate::Error::Device`] with the compiler's first error.
    fn compile(&self, source: &Source<'_>, architecture: &str) -> Result<Vec<u8>> {
        let file = format!("kernels/{}.cu", source.name);
        // It takes seconds, and all files a minute.
        if std::io::stderr().is_terminal() {
            eprintln!("compiling {file} for {architecture}");
        }
        let string = |text: &str| CString::new(text).expect("no zeros in sources");
        let (text, name) = (string(source.text), string(&file));
        let owned = |part: fn(&(&'static str, &'static str)) -> &'static str| {
            HEADERS.iter().map(|h| string(part(h))).collect::<Vec<_>>()
        };
        let (names, headers) = (owned(|h| h.0), owned(|h| h.1));
        let options: Vec<CString> = options(architecture).iter().map(|o| string(o)).collect();
        let [names, headers, options] = [&names, &headers, &options]
            .map(|list| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>());
        let mut program = ptr::null_mut();
        // SAFETY: strings that end with zeros and live until the program is destroyed.
        let created = unsafe {
            (self.create)(
                &raw mut program,
                text.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        if created != 0 {
            return Err(problem(format!("{file}: NVRTC fails (error {created})")));
        }
        // SAFETY: a program that was created.
        let answer = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = if answer == 0 {
            let (size, get) = if architecture.starts_with("sm_") {
                (self.cubin_size, self.cubin)
            } else {
                (self.ptx_size, self.ptx)
            };
            // SAFETY: a compiled program.
            let code = unsafe { text_of(program, size, get) };
            code.ok_or_else(|| problem(format!("{file}: NVRTC gives no code for {architecture}")))
        } else {
            // SAFETY: a program that was created.
            let log = unsafe { text_of(program, self.log_size, self.log) }.unwrap_or_default();
            let log = CStr::from_bytes_until_nul(&log).map_or("".into(), CStr::to_string_lossy);
            let first = log.lines().find(|line| line.contains("error"));
            let first = first.map_or_else(|| format!("{file}: error {answer}"), str::to_owned);
            Err(problem(format!(
                "NVRTC {}.{} for {architecture}: {}",
                self.version.0,
                self.version.1,
                first.trim()
            )))
        };
        // SAFETY: not used any more.
        unsafe { (self.destroy)(&raw mut program) };
        result
    }
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// # Safety
/// The two are a pair that goes with the program's state.
unsafe fn text_of(program: Program, size: Size, get: Get) -> Option<Vec<u8>> {
    let mut bytes = 0;
    // SAFETY: an integer to be written, then as many bytes as it says.
    unsafe {
        if size(program, &raw mut bytes) != 0 {
            return None;
        }
        let mut text = vec![0_u8; bytes];
        (get(program, text.as_mut_ptr().cast()) == 0).then_some(text)
    }
}

fn options(architecture: &str) -> [String; 4] {
    [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        "--generate-line-info".to_owned(),
        // Templates and generic lambdas without `__device__` are taken for the host's, of which it has none.
        "--device-as-default-execution-space".to_owned(),
    ]
}

/// Paths and names to try, the likeliest first.
fn places(wanted: Option<&OsString>) -> Vec<PathBuf> {
    if let Some(wanted) = wanted {
        let path = Path::new(wanted);
        if path.is_file() {
            return vec![path.to_owned()];
        }
        // A folder of libraries, pip's folder `nvidia`, or the folder around it; pip's packages of
        // CUDA 13 share a folder, older ones have their own.
        let under = ["", "lib", "cu13/lib", "cuda_nvrtc/lib"];
        let roots = [path.to_owned(), path.join("nvidia")];
        let folders = roots.iter().flat_map(|root| under.map(|u| root.join(u)));
        return folders
            .flat_map(|folder| libraries(&folder, "nvrtc"))
            .collect();
    }
    let names = cudarc::get_lib_name_candidates("nvrtc");
    let home = ["CUDA_HOME", "CUDA_PATH"].map(env::var_os);
    let home = home.into_iter().flatten().map(PathBuf::from);
    let homes = home.chain([PathBuf::from("/usr/local/cuda")]);
    let folders = homes.flat_map(|home| ["lib64", "lib", "bin"].map(|under| home.join(under)));
    let files = folders.flat_map(|folder| libraries(&folder, "nvrtc"));
    names.into_iter().map(PathBuf::from).chain(files).collect()
}

/// The files of a folder that are versions of a library, newest first.
fn libraries(folder: &Path, name: &str) -> Vec<PathBuf> {
    let begin = if cfg!(windows) {
        format!("{name}64_")
    } else {
        format!("lib{name}.so")
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let file = path.file_name().map(|name| name.to_string_lossy());
            file.is_some_and(|file| file.starts_with(&begin) && !file.contains(".alt."))
        })
        .collect();
    files.sort();
    files.reverse();
    files
}

/// One file of kernels.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Its name without `.cu`.
    pub name: &'a str,
    pub text: &'a str,
}

/// Where compiled kernels are kept: `ECHOGRAD_CACHE` (empty for nowhere), or the user's cache folder.
pub(crate) fn cache() -> Option<PathBuf> {
    if let Some(folder) = env::var_os("ECHOGRAD_CACHE") {
        return (!folder.is_empty()).then(|| folder.into());
    }
    // A relative path in XDG_CACHE_HOME is to be ignored, says its specification.
    let folder = |name: &str| {
        let path = env::var_os(name).map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let base = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else {
        folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))
    };
    Some(base?.join("echograd"))
}

/// The code of `source` for a GPU, from the cache if it is there and sound.
///
/// # Errors
/// [`crate::Error::Device`] with the compiler's first error. That nothing can be kept is none.
pub(super) fn compiled(
    nvrtc: &Nvrtc,
    source: Source<'_>,
    architecture: &str,
    cache: Option<&Path>,
) -> Result<Vec<u8>> {
    let Some(folder) = cache else {
        return nvrtc.compile(&source, architecture);
    };
    let file = folder.join(format!(
        "{}-{}.bin",
        source.name,
        key(nvrtc, &source, architecture)
    ));
    if let Some(code) = fs::read(&file).ok().and_then(sound) {
        return Ok(code);
    }
    let code = nvrtc.compile(&source, architecture)?;
    // The next run compiles again if this fails.
    let _ = keep(folder, &file, &code);
    Ok(code)
}

/// Everything that the code depends on.
fn key(nvrtc: &Nvrtc, source: &Source<'_>, architecture: &str) -> String {
    let mut digest = Sha256::new();
    let mut add = |text: &str| {
        digest.update((text.len() as u64).to_le_bytes());
        digest.update(text);
    };
    add(source.name);
    add(source.text);
    for (name, text) in HEADERS {
        add(name);
        add(text);
    }
    for option in options(architecture) {
        add(&option);
    }
    add(&format!("{:?}", nvrtc.version));
    digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The code in a file of the cache, unless that is damaged.
fn sound(file: Vec<u8>) -> Option<Vec<u8>> {
    let (digest, code) = file.strip_prefix(MAGIC)?.split_at_checked(DIGEST)?;
    (digest == Sha256::digest(code).as_slice()).then(|| code.to_vec())
}

/// Writes a file that is either whole or not there, whoever else writes it.
fn keep(folder: &Path, file: &Path, code: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    for part in [MAGIC, &Sha256::digest(code), code] {
        new.write_all(part)?;
    }
    new.persist(file)?;
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::Command;

    use super::*;

    const SOURCE: Source<'static> = Source {
        name: "test",
        text: "#include \"device.cuh\"\nextern \"C\" __global__ void twice_f32(float* x) { *x *= 2.0f; }\n",
    };

    /// A run-time compiler that makes the text `code for ARCHITECTURE`.
    fn fake(folder: &Path) -> Nvrtc {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver/fake_nvrtc.c");
        let library = folder.join("libnvrtc.so.13");
        let compiler = env::var("CC").unwrap_or("cc".into());
        let mut command = Command::new(compiler);
        command.args(["-std=gnu11", "-shared", "-fPIC", "-o"]);
        assert!(
            command
                .args([&library, &source])
                .status()
                .unwrap()
                .success()
        );
        Nvrtc::open(&library).unwrap()
    }

    #[test]
    fn machine_code_where_it_runs_and_ptx_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let nvrtc = fake(folder.path());
        let architecture = |capability| nvrtc.architecture(capability);
        for (capability, expected) in [
            ((7, 5), "sm_75"),
            ((8, 6), "sm_86"),
            ((8, 9), "sm_86"),
            ((9, 0), "sm_90a"),
            ((10, 3), "sm_100"),
            ((12, 0), "compute_100"),
        ] {
            assert_eq!(architecture(capability).unwrap(), expected);
        }
        let problem = architecture((7, 0)).unwrap_err().to_string();
        assert!(problem.contains("NVRTC 13.0 compiles for no GPU of compute capability 7.0"));
        for architecture in ["sm_86", "compute_100"] {
            let code = nvrtc.compile(&SOURCE, architecture).unwrap();
            assert_eq!(code, format!("code for {architecture}\0").as_bytes());
        }
    }

    #[test]
    fn the_first_error_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source {
            name: "bad",
            text: "a mistake",
        };
        let problem = compiled(&fake(folder.path()), source, "sm_80", None).unwrap_err();
        let expected = "cuda: NVRTC 13.0 for sm_80: kernels/bad.cu(2): error: mistake";
        assert_eq!(problem.to_string(), expected);
    }

    #[test]
    fn the_cache_is_used_if_it_is_sound() {
        let folder = tempfile::tempdir().unwrap();
        let (nvrtc, cache) = (fake(folder.path()), folder.path().join("some/cache"));
        let get =
            |source, architecture| compiled(&nvrtc, source, architecture, Some(&cache)).unwrap();
        let code = get(SOURCE, "sm_80");
        let files = || -> Vec<PathBuf> {
            fs::read_dir(&cache)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect()
        };
        let [file] = &files()[..] else {
            panic!("{:?}", files())
        };
        // Somebody else's code under the same key shows that the file was read.
        let sound = fs::read(file).unwrap();
        keep(&cache, file, b"other").unwrap();
        assert_eq!(get(SOURCE, "sm_80"), b"other");
        let mut flipped = sound.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let broken = [
            &sound[..sound.len() - 1],
            &sound[..30],
            b"",
            b"something else",
            &flipped,
        ];
        for broken in broken {
            fs::write(file, broken).unwrap();
            assert_eq!(get(SOURCE, "sm_80"), code);
            assert_eq!(fs::read(file).unwrap(), sound, "mended");
        }
        // A folder where a file should be can be neither read nor replaced.
        fs::remove_file(file).unwrap();
        fs::create_dir_all(file.join("full")).unwrap();
        assert_eq!(get(SOURCE, "sm_80"), code);
        get(SOURCE, "sm_90a");
        let changed = Source {
            text: "// other\n",
            ..SOURCE
        };
        get(changed, "sm_80");
        assert_eq!(
            files().len(),
            3,
            "one per source and architecture: {:?}",
            files()
        );
    }

    #[test]
    #[cfg_attr(not(echograd_nvrtc), ignore = "set ECHOGRAD_NVRTC")]
    fn every_module_compiles() {
        use crate::device::code::{Code, MODULES};
        let nvrtc = Nvrtc::find(None).unwrap();
        let machine_code =
            |source, architecture| compiled(&nvrtc, source, architecture, None).unwrap();
        for architecture in ["sm_80", "sm_90a"] {
            assert!(machine_code(SOURCE, architecture).starts_with(b"\x7fELF"));
            for module in MODULES {
                if let Code::Source(text) = module.code {
                    let name = module.name;
                    assert!(
                        machine_code(Source { name, text }, architecture).starts_with(b"\x7fELF")
                    );
                }
            }
        }
        assert!(machine_code(SOURCE, "compute_80").starts_with(b"//\n// Generated by NVIDIA NVVM"));
        let wrong = Source {
            name: "wrong",
            text: "#include \"device.cuh\"\nint x = y;\n",
        };
        let problem = compiled(&nvrtc, wrong, "sm_80", None)
            .unwrap_err()
            .to_string();
        assert!(problem.contains("kernels/wrong.cu(2): error:"), "{problem}");
    }
}
