//! Ranges that profilers show on their timeline, if NVTX's library is there.

use std::ffi::{CString, c_char, c_int};
use std::sync::LazyLock;

use libloading::Library;

struct Nvtx {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
    _library: Library,
}

static NVTX: LazyLock<Option<Nvtx>> = LazyLock::new(|| {
    let names = if cfg!(windows) {
        ["nvToolsExt64_1.dll", "nvtx3interop.dll"]
    } else {
        ["libnvToolsExt.so.1", "libnvtx3interop.so"]
    };
    names.into_iter().find_map(|name| {
        // SAFETY: the library's initialisers have no demands; the types are those of its header.
        unsafe {
            let library = Library::new(name).ok()?;
            Some(Nvtx {
                push: *library.get(b"nvtxRangePushA").ok()?,
                pop: *library.get(b"nvtxRangePop").ok()?,
                _library: library,
            })
        }
    })
});

/// Opens a range of the calling thread.
pub(super) fn push(name: &str) {
    if let Some(nvtx) = &*NVTX {
        let name = CString::new(name.replace('\0', " ")).expect("no zero in it");
        // SAFETY: a string that ends with a zero, which is copied.
        unsafe { (nvtx.push)(name.as_ptr()) };
    }
}

/// Closes the range opened last.
pub(super) fn pop() {
    if let Some(nvtx) = &*NVTX {
        // SAFETY: no arguments.
        unsafe { (nvtx.pop)() };
    }
}
