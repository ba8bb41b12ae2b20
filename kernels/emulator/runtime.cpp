// Runs one block of a kernel at a time on the calling host thread, one fiber per CUDA thread.
//
// A block is deterministic in (seed, block index): fibers switch only where a thread waits, and the
// order in which warps and lanes go on is drawn from the seed. Whole blocks run in parallel on
// whatever host threads call echograd_emulator_block.
//
// Kernel files are compiled with the instrumentation of -fsanitize=thread and some of
// -fsanitize=undefined, but neither runtime is linked: the hooks are defined at the end of this
// file, and check each access against the memory of the launch and against a shadow of the block's
// shared memory. Where a real sanitizer is wanted instead, ECHOGRAD_ADDRESS or ECHOGRAD_THREAD is
// defined and the fibers are announced to it.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include <link.h>
#include <sys/mman.h>

#ifdef ECHOGRAD_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef ECHOGRAD_THREAD
#include <sanitizer/tsan_interface.h>
#endif

#include "emulator.h"  // last: its macros are not for the headers above

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kWarpgroup = 4;  // warps
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kSharedLimit = 227 * 1024;  // per block, from compute capability 9.0 on
constexpr size_t kStaticLimit = 48 * 1024;
constexpr size_t kLine = 128;  // arrays start on one, and never share one
constexpr size_t kFirst = 1024;  // where dynamic shared memory starts, aligned as DYNAMIC_SHARED says and no further
constexpr size_t kMaxArrays = 64;
constexpr size_t kArena = kFirst + kSharedLimit / kLine * kLine + 2 * kLine * (kMaxArrays + 1);
#ifdef ECHOGRAD_ADDRESS
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kGuard = 4096;

// Counter-free splitmix64: good enough to draw orders from.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    unsigned below(unsigned n) { return static_cast<unsigned>((next() >> 32) * n >> 32); }
};

}  // namespace

// ---- What Rust passes in and gets back; the layout is repeated in src/device/emulator.rs. ----

struct Range {
    uintptr_t begin, end;
};

struct LaunchSpec {
    const Entry* entry;
    void* const* arguments;
    dim3 grid, block;
    size_t shared_bytes;
    uint64_t seed;
    const Range* memory;  // sorted, disjoint: what the kernel may touch
    size_t ranges;
};

struct Report {
    char message[640];
    uint3 block, thread;
    const void* at;     // return address in the kernel, or null
    const void* other;  // of the access or call it conflicts with, or null
};

namespace {

// ---- Fibers ----

#if defined(__x86_64__)
// Saves the callee-saved registers, stores the stack pointer through rdi and takes that of rsi.
__asm__(R"(
    .text
    .p2align 4
    .local echograd_switch
echograd_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void echograd_switch(void** from, void* to);
struct Context {
    void* pointer = nullptr;
    void start(char* top, void (*entry)()) {
        void** frame = reinterpret_cast<void**>(top) - 8;  // six registers, entry, its return address
        std::fill(frame, frame + 8, nullptr);
        frame[6] = reinterpret_cast<void*>(entry);
        pointer = frame;
    }
    static void swap(Context& from, Context& to) { echograd_switch(&from.pointer, to.pointer); }
};
#elif defined(__aarch64__)
__asm__(R"(
    .text
    .p2align 4
echograd_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
extern "C" void echograd_switch(void** from, void* to);
struct Context {
    void* pointer = nullptr;
    void start(char* top, void (*entry)()) {
        void** frame = reinterpret_cast<void**>(top) - 20;
        std::fill(frame, frame + 20, nullptr);
        frame[11] = reinterpret_cast<void*>(entry);
        pointer = frame;
    }
    static void swap(Context& from, Context& to) { echograd_switch(&from.pointer, to.pointer); }
};
#else
}  // namespace
}  // namespace emulator
#include <ucontext.h>
namespace emulator {
namespace {
struct Context {
    ucontext_t context;
    void start(char* top, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = top - kStack / 2;
        context.uc_stack.ss_size = kStack / 2;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Stack {
    char* low = nullptr;
    char* top = nullptr;
};

struct Copy {
    char* shared;
    const char* global;
    unsigned short bytes, valid;
    unsigned group;
    bool moved;
};

// A product of wgmma that is under way, as far as one warp is concerned.
struct Product {
    float* sums[kWarp];
    uint64_t a, b;
    int columns;
    bool transposed, done;
    unsigned group;
    const void* at;
};

struct Warp;

struct Thread {
    Context context;
    Stack* stack = nullptr;
    Warp* warp = nullptr;
    unsigned short index = 0;
    unsigned char lane = 0;
    bool started = false, exited = false;
    uint3 position{};
    // What it waits for, if it waits.
    enum class Wait : unsigned char { None, Block, Warp } wait = Wait::None;
    const char* call = nullptr;
    Where where;
    const void* at = nullptr;
    unsigned mask = 0;
    // Operands and result of a collective.
    uint64_t value = 0, result = 0;
    int operand = 0;
    const void* pointers[3] = {};
    // cp.async
    std::vector<Copy> copies;
    unsigned groups = 0;  // committed
    // Of each fence of the async proxy the stretch between two block barriers that it was in.
    std::vector<unsigned> fences;
#ifdef ECHOGRAD_ADDRESS
    void* fake_stack = nullptr;
#endif
#ifdef ECHOGRAD_THREAD
    void* fiber = nullptr;
#endif
};

struct Group {
    unsigned mask = 0, arrived = 0;
#ifdef ECHOGRAD_THREAD
    // Two, in turn: who leaves late must not come after what the early ones did next.
    unsigned phase = 0;
    char sync[2] = {};
#endif
};

struct Warp {
    unsigned index = 0, rank = 0, lanes = 0;
    unsigned runnable = 0, exited = 0;
    unsigned rotation = 0;
    bool reversed = false;
    Thread* thread = nullptr;  // lane 0
    Group groups[kWarp];       // by the lowest lane of the mask
    // clock[l][m]: up to what time lane l is ordered after lane m by __syncwarp, within the stretch
    // between two block barriers; time 0 is "not at all".
    unsigned time = 0;
    unsigned clock[kWarp][kWarp];
    // wgmma: products not waited for, groups committed, products begun, and whether there was a fence since the last wait.
    std::vector<Product> products;
    unsigned groups_of_products = 0, begun = 0;
    bool fenced = false;
};

struct Array {
    const void* identity;
    const char* name;
    Where where;
    size_t begin, bytes;
};

// What is known of one byte of shared memory. Stamps count block barriers over the life of the
// worker, so that nothing needs clearing between blocks.
struct Cell {
    unsigned write_stamp = 0, write_time = 0, write_at = 0;
    unsigned short writer = 0;
    unsigned char atomic = 0, pending = 0;
    unsigned read_stamp = 0, read_time = 0, read_at = 0;
    unsigned readers = 0;  // lanes of `read_warp` not ordered among themselves
    unsigned char read_warp = 0, read_elsewhere = 0;
    unsigned short products = 0;  // under way that read it, once for each warp
    unsigned fences = 0;          // of its writer before it wrote
};

struct Image {
    uintptr_t begin = 0, end = 0;
};

// The loaded object that this code is in: constant tables of kernels lie there.
Image own_image() {
    Image image;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Image found{UINTPTR_MAX, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type == PT_LOAD) {
                    uintptr_t begin = info->dlpi_addr + header.p_vaddr;
                    found.begin = std::min(found.begin, begin);
                    found.end = std::max(found.end, begin + header.p_memsz);
                }
            }
            uintptr_t here = reinterpret_cast<uintptr_t>(&own_image);
            if (found.begin <= here && here < found.end) {
                *static_cast<Image*>(data) = found;
                return 1;
            }
            return 0;
        },
        &image);
    return image;
}

// Everything one host thread needs to run blocks; kept for its lifetime.
struct Worker {
    Image image = own_image();
    Context host;
    const LaunchSpec* launch = nullptr;
    Report* report = nullptr;
    bool failed = false;
    Thread* current = nullptr;
    Thread* first_waiting = nullptr;  // in the block's barrier
    uint3 block{};
    Random random{0};
    char* stack_memory = nullptr;
    std::vector<Stack> stacks = std::vector<Stack>(kMaxThreads);
    std::vector<Stack*> spare;
    std::vector<Thread> threads = std::vector<Thread>(kMaxThreads);
    std::vector<Warp> warps = std::vector<Warp>(kMaxThreads / kWarp);
    // What the warps of each warpgroup have begun, in order: all the same.
    std::vector<Product> begun[kMaxThreads / kWarp / kWarpgroup];
    Warp* by_rank[kWarp];
    unsigned ready = 0;  // bit r: the warp of rank r has a runnable lane
    unsigned size = 0, alive = 0, waiting = 0;
    int predicates = 0;
    Range known{1, 0};  // the range of the last global access
    // Shared memory
    char* shared = nullptr;
    size_t shared_end = 0;
    std::vector<Array> arrays;
    std::vector<unsigned char> owner = std::vector<unsigned char>(kArena / kLine);
    std::vector<Cell> cells;
    unsigned stamp = 1, first_stamp = 1;
#ifdef ECHOGRAD_ADDRESS
    void* host_fake = nullptr;
    const void* host_bottom = nullptr;
    size_t host_size = 0;
#endif
#ifdef ECHOGRAD_THREAD
    void* host_fiber = nullptr;
    char begin_sync = 0, end_sync = 0, barrier_sync[2] = {};
#endif

    Worker() {
        shared = static_cast<char*>(aligned_alloc(2 * kFirst, (kArena / kFirst + 2) / 2 * 2 * kFirst));
#ifdef ECHOGRAD_CHECKED
        cells.resize(kArena);
#endif
        void* memory = mmap(nullptr, kMaxThreads * (kStack + kGuard), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return;
        stack_memory = static_cast<char*>(memory);
        for (unsigned i = 0; i < kMaxThreads; ++i) {
            char* guard = stack_memory + i * (kStack + kGuard);
            mprotect(guard, kGuard, PROT_NONE);
            stacks[i].low = guard + kGuard;
            // Tops at the same offset of every page would all fall into the same cache sets.
            stacks[i].top = stacks[i].low + kStack - i % 61 * 64;
        }
        for (unsigned i = kMaxThreads; i-- > 0;) spare.push_back(&stacks[i]);
    }
    Worker(const Worker&) = delete;
    ~Worker() {
        if (stack_memory != nullptr) munmap(stack_memory, kMaxThreads * (kStack + kGuard));
        free(shared);
    }

    Stack* take_stack(const Thread& thread);
    void enter(Thread& next);
    void leave_to(Thread& next);
    Thread* pick();
    void run();
    void draw_order();
    [[noreturn]] void fail(const void* at, const void* other, const char* format, ...)
        __attribute__((format(printf, 4, 5)));
    void block_thread();
    [[noreturn]] void deadlock();
    void release_barrier();
    void leave_products();
    size_t place(const void* identity, const char* name, size_t bytes, Where where);
};

thread_local Worker* tls_worker = nullptr;

// Never inlined: a fiber stays on its host thread, but the compiler need not rely on that.
Worker& worker() { return *tls_worker; }
Thread& self() { return *worker().current; }

[[maybe_unused]] const void* address_of(unsigned compressed) {
    return compressed == 0 ? nullptr
                           : reinterpret_cast<const void*>(worker().image.begin + compressed);
}
[[maybe_unused]] unsigned compress(const void* at) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(at) - worker().image.begin);
}

Stack* Worker::take_stack([[maybe_unused]] const Thread& thread) {
#ifdef ECHOGRAD_THREAD
    // Two fibers on one stack would look like a race on it.
    return &stacks[thread.index];
#else
    Stack* stack = spare.back();
    spare.pop_back();
    return stack;
#endif
}

#ifdef ECHOGRAD_ADDRESS
void switch_begin(void** save, const void* bottom, size_t size) {
    __sanitizer_start_switch_fiber(save, bottom, size);
}
void switch_end(void* saved) {
    Worker& w = worker();
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(saved, &bottom, &size);
    if (w.host_bottom == nullptr) {
        w.host_bottom = bottom;
        w.host_size = size;
    }
}
#endif

void announce(Thread& thread) {
#ifdef ECHOGRAD_THREAD
    __tsan_switch_to_fiber(thread.fiber, 1);
#else
    (void)thread;
#endif
}

// The life of a fiber: a thread that ends hands its stack to one that has not begun.
void fiber_main() {
#ifdef ECHOGRAD_ADDRESS
    switch_end(nullptr);
#endif
    for (;;) {
        Worker& w = worker();
        Thread& thread = self();
        thread.started = true;
#ifdef ECHOGRAD_THREAD
        __tsan_acquire(&w.begin_sync);
#endif
        w.launch->entry->run(w.launch->arguments);
        w.leave_products();
#ifdef ECHOGRAD_THREAD
        __tsan_release(&w.end_sync);
#endif
        thread.exited = true;
        thread.warp->exited |= 1u << thread.lane;
        w.alive -= 1;
        Thread* next = w.pick();
        if (next == nullptr) {
            if (w.alive != 0) w.deadlock();
        }
#ifndef ECHOGRAD_THREAD
        if (next != nullptr && !next->started) {
            next->stack = thread.stack;
            thread.stack = nullptr;
            w.current = next;
            continue;
        }
#endif
#ifndef ECHOGRAD_THREAD
        w.spare.push_back(thread.stack);
#endif
        thread.stack = nullptr;
#ifdef ECHOGRAD_ADDRESS
        // A null save pointer says that this stack is done with.
        if (next == nullptr) switch_begin(nullptr, w.host_bottom, w.host_size);
#endif
        if (next != nullptr) {
            w.enter(*next);
#ifdef ECHOGRAD_ADDRESS
            switch_begin(nullptr, next->stack->low, kStack);
#endif
            announce(*next);
            Context::swap(thread.context, next->context);
        } else {
#ifdef ECHOGRAD_THREAD
            __tsan_switch_to_fiber(w.host_fiber, 1);
#endif
            Context::swap(thread.context, w.host);
        }
        __builtin_unreachable();
    }
}

// Makes `next` the current thread; the caller switches to its context.
void Worker::enter(Thread& next) {
    if (!next.started && next.stack == nullptr) {
        next.stack = take_stack(next);
        next.context.start(next.stack->top, fiber_main);
    }
    current = &next;
}

void Worker::leave_to(Thread& next) {
    Thread& thread = *current;
    enter(next);
#ifdef ECHOGRAD_ADDRESS
    switch_begin(&thread.fake_stack, next.stack->low, kStack);
#endif
    announce(next);
    Context::swap(thread.context, next.context);
#ifdef ECHOGRAD_ADDRESS
    switch_end(thread.fake_stack);
#endif
}

// The next thread to run: of the first warp in the drawn order that can, the first lane in its own.
Thread* Worker::pick() {
    if (ready == 0) return nullptr;
    Warp& warp = *by_rank[__builtin_ctz(ready)];
    unsigned r = warp.rotation;
    unsigned turned = r == 0 ? warp.runnable : (warp.runnable >> r | warp.runnable << (kWarp - r));
    unsigned lane = warp.reversed ? 31 - __builtin_clz(turned) : __builtin_ctz(turned);
    lane = (lane + r) % kWarp;
    warp.runnable &= ~(1u << lane);
    if (warp.runnable == 0) ready &= ~(1u << warp.rank);
    return warp.thread + lane;
}

// Warps run by priority, drawn anew at every barrier: one warp may so run as far ahead of the others
// as the barriers allow, which is what shows a missing one.
void Worker::draw_order() {
    unsigned count = (size + kWarp - 1) / kWarp;
    for (unsigned i = 0; i < count; ++i) by_rank[i] = &warps[i];
    ready = 0;
    for (unsigned i = count; i-- > 0;) {
        std::swap(by_rank[i], by_rank[random.below(i + 1)]);
        Warp& warp = *by_rank[i];
        uint64_t bits = random.next();
        warp.rotation = bits & 31;
        warp.reversed = bits & 32;
        warp.rank = i;
        if (warp.runnable != 0) ready |= 1u << i;
    }
}

void Worker::fail(const void* at, const void* other, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(report->message, sizeof report->message, format, arguments);
    va_end(arguments);
    report->block = block;
    report->thread = current->position;
    report->at = at;
    report->other = other;
    failed = true;
    Thread& thread = *current;
#ifdef ECHOGRAD_ADDRESS
    switch_begin(&thread.fake_stack, host_bottom, host_size);
#endif
#ifdef ECHOGRAD_THREAD
    __tsan_switch_to_fiber(host_fiber, 1);
#endif
    Context::swap(thread.context, host);
    __builtin_unreachable();
}

// The current thread cannot go on: runs others until something wakes it.
void Worker::block_thread() {
    Thread* next = pick();
    if (next == nullptr) deadlock();
    if (next == current) return;
    leave_to(*next);
}

// No thread can run. Says why, from the point of view of a thread that waits in vain.
void Worker::deadlock() {
    Thread* waits = nullptr;
    for (unsigned i = 0; i < size && waits == nullptr; ++i) {
        if (threads[i].wait == Thread::Wait::Warp) waits = &threads[i];
    }
    for (unsigned i = 0; i < size && waits == nullptr; ++i) {
        if (threads[i].wait == Thread::Wait::Block) waits = &threads[i];
    }
    Thread& first = *waits;
    auto in_vain = [&](Thread& missing, const char* scope) {
        current = &first;
        if (missing.exited) {
            fail(first.at, nullptr, "divergence: waits in %s%s for thread (%u,%u,%u), which has returned",
                 first.call, scope, missing.position.x, missing.position.y, missing.position.z);
        }
        fail(first.at, missing.at, "divergence: waits in %s%s for thread (%u,%u,%u), which waits in %s",
             first.call, scope, missing.position.x, missing.position.y, missing.position.z,
             missing.call);
    };
    if (first.wait == Thread::Wait::Warp) {
        char scope[32];
        snprintf(scope, sizeof scope, " (mask %08x)", first.mask);
        const Group& group = first.warp->groups[__builtin_ctz(first.mask)];
        in_vain(first.warp->thread[__builtin_ctz(group.mask & ~group.arrived)], scope);
    }
    for (unsigned i = 0; i < size; ++i) {
        if (threads[i].wait != Thread::Wait::Block) in_vain(threads[i], "");
    }
    __builtin_unreachable();  // all in one barrier would have been released
}

void Worker::release_barrier() {
    stamp += 1;
    waiting = 0;
    for (unsigned i = 0; i < size; ++i) {
        threads[i].result = static_cast<uint64_t>(predicates);
        threads[i].wait = Thread::Wait::None;
    }
    predicates = 0;
    for (unsigned i = 0; i * kWarp < size; ++i) {
        warps[i].runnable = warps[i].lanes;
        warps[i].time = 0;  // what came before the barrier is ordered by its stamp
    }
}

// ---- Memory ----

size_t Worker::place(const void* identity, const char* name, size_t bytes, Where where) {
    size_t begin = shared_end;
    size_t lines = (bytes + kLine - 1) / kLine;
    std::fill_n(owner.begin() + static_cast<ptrdiff_t>(begin / kLine), lines,
                static_cast<unsigned char>(arrays.size() + 1));
    owner[begin / kLine + lines] = 0;
    shared_end = begin + (lines + 1) * kLine;  // a line of no man's land after each array
    arrays.push_back({identity, name, where, begin, bytes});
#ifdef ECHOGRAD_ADDRESS
    __asan_unpoison_memory_region(shared + begin, bytes);
#endif
#ifdef ECHOGRAD_THREAD
    // Not memset, which ThreadSanitizer would take for a write by the current fiber.
    for (volatile char* byte = shared + begin; byte != shared + begin + bytes; ++byte) *byte = -1;
#else
    memset(shared + begin, 0xff, bytes);
#endif
    return begin;
}

[[maybe_unused]] const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

// Reports an access to shared memory outside of its arrays.
[[maybe_unused, noreturn]] void outside_shared(Worker& w, size_t offset, size_t bytes, bool write,
                                               const void* at) {
    const Array* nearest = nullptr;
    for (const Array& array : w.arrays) {
        if (array.begin <= offset) nearest = &array;
    }
    if (nearest == nullptr) {
        w.fail(at, nullptr, "out of bounds: %s %zu bytes before the first array of shared memory",
               write ? "writes" : "reads", bytes);
    }
    w.fail(at, nullptr,
           "out of bounds: %s %zu bytes at byte %zu of shared array %s (%s:%u), which has %zu",
           write ? "writes" : "reads", bytes, offset - nearest->begin, nearest->name,
           base_name(nearest->where.file_name()), static_cast<unsigned>(nearest->where.line()),
           nearest->bytes);
}

#ifdef ECHOGRAD_CHECKED
// True if the current thread's accesses come after that of `other` at `time`, in the same stretch.
bool ordered(const Thread& thread, const Warp& warp, unsigned lane, unsigned time) {
    return lane == thread.lane || (warp.time != 0 && warp.clock[thread.lane][lane] >= time);
}

void check_shared(Worker& w, size_t offset, size_t bytes, bool write, bool atomic, const void* at) {
    unsigned char owner = w.owner[offset / kLine];
    if (owner == 0 || offset + bytes > w.arrays[owner - 1].begin + w.arrays[owner - 1].bytes) {
        outside_shared(w, offset, bytes, write, at);
    }
    const char* name = w.arrays[owner - 1].name;
    size_t element = offset - w.arrays[owner - 1].begin;
    Thread& thread = *w.current;
    Warp& warp = *thread.warp;
    const char* verb = atomic ? "updates" : write ? "writes" : "reads";
    for (Cell* cell = &w.cells[offset]; cell != &w.cells[offset] + bytes; ++cell, ++element) {
        bool written = cell->write_stamp >= w.first_stamp;
        if (!written && (!write || atomic)) {
            w.fail(at, nullptr, "uninitialised: %s byte %zu of shared array %s, which nobody has written yet",
                   verb, element, name);
        }
        if (write && cell->products != 0) {
            w.fail(at, address_of(cell->read_at),
                   "race: %s byte %zu of shared array %s, which a wgmma that is under way reads", verb, element, name);
        }
        if (written && cell->pending) {
            w.fail(at, address_of(cell->write_at),
                   "race: %s byte %zu of shared array %s, to which a cp.async is still in flight",
                   verb, element, name);
        }
        if (cell->write_stamp == w.stamp && cell->writer != thread.index &&
            !(atomic && cell->atomic)) {
            const Thread& writer = w.threads[cell->writer];
            if (writer.warp != &warp || !ordered(thread, warp, writer.lane, cell->write_time)) {
                w.fail(at, address_of(cell->write_at),
                       "race: %s byte %zu of shared array %s, which thread (%u,%u,%u) wrote without "
                       "a barrier in between", verb, element, name, writer.position.x,
                       writer.position.y, writer.position.z);
            }
        }
        bool read = cell->read_stamp == w.stamp;
        if (write) {
            if (read) {
                bool raced = cell->read_warp != warp.index || cell->read_elsewhere;
                for (unsigned lanes = cell->readers; lanes != 0 && !raced; lanes &= lanes - 1) {
                    raced = !ordered(thread, warp, __builtin_ctz(lanes), cell->read_time);
                }
                if (raced) {
                    w.fail(at, address_of(cell->read_at),
                           "race: %s byte %zu of shared array %s, which another thread read without "
                           "a barrier in between", verb, element, name);
                }
            }
            cell->write_stamp = w.stamp;
            cell->write_time = warp.time + 1;
            cell->write_at = compress(at);
            cell->writer = thread.index;
            cell->atomic = atomic;
            cell->pending = 0;
            cell->fences = static_cast<unsigned>(thread.fences.size());
            cell->read_stamp = 0;
        } else {
            if (!read) {
                cell->readers = 0;
                cell->read_warp = static_cast<unsigned char>(warp.index);
                cell->read_elsewhere = 0;
            } else if (cell->read_warp != warp.index) {
                cell->read_elsewhere = 1;
                continue;
            }
            unsigned lanes = cell->readers;
            if (lanes != 0 && cell->read_time != warp.time + 1) {
                // Of earlier readers only those not ordered before this one need remembering.
                for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
                    unsigned lane = __builtin_ctz(rest);
                    if (ordered(thread, warp, lane, cell->read_time)) lanes &= ~(1u << lane);
                }
            }
            cell->readers = lanes | 1u << thread.lane;
            cell->read_stamp = w.stamp;
            cell->read_time = warp.time + 1;
            cell->read_at = compress(at);
        }
    }
}

void check_elsewhere(Worker& w, uintptr_t address, size_t bytes, bool write, const void* at) {
    const Stack& stack = *w.current->stack;
    if (address - reinterpret_cast<uintptr_t>(stack.low) < kStack) {
        for (const Product& product : w.current->warp->products) {
            const uintptr_t sums = reinterpret_cast<uintptr_t>(product.sums[w.current->lane]);
            if (address < sums + static_cast<size_t>(product.columns / 2) * sizeof(float) && sums < address + bytes) {
                w.fail(at, product.at, "race: %s a sum of a wgmma that is under way", write ? "writes" : "reads");
            }
        }
        return;
    }
    const Range* end = w.launch->memory + w.launch->ranges;
    const Range* after = std::upper_bound(w.launch->memory, end, address,
        [](uintptr_t a, const Range& range) { return a < range.begin; });
    if (after != w.launch->memory && address + bytes <= after[-1].end) {
        w.known = after[-1];
        return;
    }
    if (address - w.image.begin < w.image.end - w.image.begin) return;
    const char* verb = write ? "writes" : "reads";
    if (after != w.launch->memory && address - after[-1].end < (size_t{1} << 20)) {
        w.fail(at, nullptr, "out of bounds: %s %zu bytes at byte %zu of a buffer of %zu", verb, bytes,
               static_cast<size_t>(address - after[-1].begin),
               static_cast<size_t>(after[-1].end - after[-1].begin));
    }
    if (after != end && after->begin - address < (size_t{1} << 20)) {
        w.fail(at, nullptr, "out of bounds: %s %zu bytes %zu before a buffer of %zu", verb, bytes,
               static_cast<size_t>(after->begin - address),
               static_cast<size_t>(after->end - after->begin));
    }
    w.fail(at, nullptr, "out of bounds: %s %zu bytes at %p, far from every buffer", verb, bytes,
           reinterpret_cast<void*>(address));
}
#endif

// Every access of a kernel passes here (with the real sanitizers, only those made in this file).
inline void check(const void* pointer, size_t bytes, bool write, bool atomic, const void* at) {
    Worker* w = tls_worker;
    if (w == nullptr || w->current == nullptr) return;
#ifdef ECHOGRAD_CHECKED
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    size_t offset = address - reinterpret_cast<uintptr_t>(w->shared);
    if (offset < kArena) {
        check_shared(*w, offset, bytes, write, atomic, at);
    } else if (!(w->known.begin <= address && address + bytes <= w->known.end)) {
        check_elsewhere(*w, address, bytes, write, at);
    }
#elif defined(ECHOGRAD_ADDRESS)
    (void)atomic;
    if (__asan_region_is_poisoned(const_cast<void*>(pointer), bytes) != nullptr) {
        w->fail(at, nullptr, "out of bounds: %s %zu bytes of poisoned memory",
                write ? "writes" : "reads", bytes);
    }
#else
    (void)pointer, (void)bytes, (void)write, (void)atomic, (void)at;
#endif
}

void check_alignment(const void* pointer, size_t bytes, const char* what, const void* at) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
        worker().fail(at, nullptr, "misaligned: %s needs an address divisible by %zu, %p is not", what,
                      bytes, pointer);
    }
}

// ---- Collectives ----

bool same(const Where& a, const Where& b) {
    return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

// The one warp collective: the lanes of `mask` meet, the last one in runs `function` on all of them.
// Operands are in the fields of Thread, and so are results.
template <class F>
void collective(const char* call, unsigned mask, const Where& where, const void* at, F&& function) {
    Worker& w = worker();
    Thread& thread = *w.current;
    Warp& warp = *thread.warp;
    if ((mask >> thread.lane & 1) == 0) {
        w.fail(at, nullptr, "divergence: %s with mask %08x, which leaves out the calling lane %u", call,
               mask, thread.lane);
    }
    if ((mask & ~warp.lanes) != 0) {
        w.fail(at, nullptr, "divergence: %s with mask %08x in a warp of lanes %08x", call, mask,
               warp.lanes);
    }
    if ((mask & warp.exited) != 0) {
        w.fail(at, nullptr, "divergence: %s with mask %08x, of which lanes %08x have returned", call,
               mask, mask & warp.exited);
    }
    Group& group = warp.groups[__builtin_ctz(mask)];
    thread.call = call;
    thread.where = where;
    thread.at = at;
    thread.mask = mask;
    if (group.arrived == 0) {
        group.mask = mask;
    } else {
        const Thread& other = warp.thread[__builtin_ctz(group.arrived)];
        if (group.mask != mask || strcmp(other.call, call) != 0 || !same(other.where, where)) {
            w.fail(at, other.at,
                   "divergence: calls %s with mask %08x while lane %u waits in %s with mask %08x", call,
                   mask, other.lane, other.call, group.mask);
        }
    }
    group.arrived |= 1u << thread.lane;
    if (group.arrived != mask) {
        thread.wait = Thread::Wait::Warp;
        w.block_thread();
        return;
    }
    group.arrived = 0;
    function(warp, mask);
    for (unsigned rest = mask & ~(1u << thread.lane); rest != 0; rest &= rest - 1) {
        warp.thread[__builtin_ctz(rest)].wait = Thread::Wait::None;
    }
    warp.runnable |= mask & ~(1u << thread.lane);
    if (warp.runnable != 0) w.ready |= 1u << warp.rank;
}

template <class F>
void each_lane(unsigned mask, F&& f) {
    for (; mask != 0; mask &= mask - 1) f(static_cast<unsigned>(__builtin_ctz(mask)));
}

float half_to_float(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | fraction << 13);
    if (exponent != 0) return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | fraction << 13);
    float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
}

constexpr int kRows = 16, kColumns = 8;

// d += a·b as tensor cores add: so many products at once to the sum, of which the digits that f32 has not are cut off
// (Fasi et al. 2021, of sm_80; later ones take more products at once). So sums end nearer to zero, the more so the
// longer they are. Not modelled: digits that small products lose beside large ones before they are added.
#if defined(__x86_64__) && !defined(ECHOGRAD_ADDRESS) && !defined(ECHOGRAD_THREAD)
// Chosen when the program is loaded, which is too early for the sanitizers' start.
__attribute__((target_clones("arch=x86-64-v3", "default")))
#endif
void accumulate(double (&d)[kRows][kColumns], const double* a, const double* b, int depth) {
    constexpr int kAtOnce = 8;
    for (int row = 0; row < kRows; ++row) {
        for (int first = 0; first < depth; first += kAtOnce) {
            for (int k = first; k < first + kAtOnce; ++k) {
                for (int column = 0; column < kColumns; ++column) {
                    d[row][column] += a[row * depth + k] * b[k * kColumns + column];
                }
            }
            for (double& sum : d[row]) {
                constexpr uint64_t beyond = (uint64_t{1} << (52 - 23)) - 1;
                sum = __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, sum) & ~beyond);
            }
        }
    }
}

template <Element E>
float element(unsigned word, int half) {
    if constexpr (E == Element::Tf32) return __builtin_bit_cast(float, word & 0xffffe000);
    uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
    if constexpr (E == Element::F16) return half_to_float(bits);
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

// Fragments of mma.sync, PTX ISA "Matrix Fragments for mma.m16n8k16" and "...m16n8k8": a register
// holds `each` neighbours along k. Products of 16-bit operands are exact in f64.
template <Element E>
void multiply(Warp& warp) {
    constexpr int each = E == Element::Tf32 ? 1 : 2, depth = 8 * each;
    double a[kRows * depth], b[depth * kColumns], d[kRows][kColumns];
    for (int lane = 0; lane < 32; ++lane) {
        const Thread& thread = warp.thread[lane];
        const unsigned* fa = static_cast<const unsigned*>(thread.pointers[0]);
        const unsigned* fb = static_cast<const unsigned*>(thread.pointers[1]);
        const float* fd = static_cast<const float*>(thread.pointers[2]);
        int group = lane / 4, member = lane % 4;
        for (int i = 0; i < 4; ++i) {
            int row = group + 8 * (i & 1), k = each * (member + 4 * (i >> 1));
            for (int half = 0; half < each; ++half) a[row * depth + k + half] = element<E>(fa[i], half);
            d[group + 8 * (i >> 1)][2 * member + (i & 1)] = fd[i];
        }
        for (int i = 0; i < 2; ++i) {
            int k = each * (member + 4 * i);
            for (int half = 0; half < each; ++half) {
                b[(k + half) * kColumns + group] = element<E>(fb[i], half);
            }
        }
    }
    accumulate(d, a, b, depth);
    for (int lane = 0; lane < 32; ++lane) {
        float* fd = static_cast<float*>(const_cast<void*>(warp.thread[lane].pointers[2]));
        for (int i = 0; i < 4; ++i) {
            fd[i] = static_cast<float>(d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)]);
        }
    }
}

// ---- cp.async ----

void move(const Copy& copy) {
    memcpy(copy.shared, copy.global, copy.valid);
    memset(copy.shared + copy.valid, 0, static_cast<size_t>(copy.bytes - copy.valid));
}

void mark_pending([[maybe_unused]] Worker& w, [[maybe_unused]] const Copy& copy,
                  [[maybe_unused]] bool pending) {
#ifdef ECHOGRAD_CHECKED
    size_t offset = static_cast<size_t>(copy.shared - w.shared);
    for (size_t i = offset; i < offset + copy.bytes; ++i) {
        w.cells[i].pending = pending;
        w.cells[i].write_stamp = w.stamp;
        w.cells[i].write_time = w.current->warp->time + 1;
        w.cells[i].fences = static_cast<unsigned>(w.current->fences.size());
    }
#endif
}

void complete(Worker& w, const Copy& copy) {
    if (!copy.moved) move(copy);
    mark_pending(w, copy, false);
}

// ---- wgmma ----

// A matrix in shared memory, as a descriptor says: PTX ISA, "Matrix Descriptor" of wgmma.
struct Matrix {
    size_t start, leading, stride;
    unsigned vectors;  // of 16 bytes in a row that is swizzled; 1: no swizzle
    bool transposed;

    Matrix(uint64_t bits, bool transpose, const void* at) : transposed(transpose) {
        auto field = [bits](int first) { return static_cast<size_t>(bits >> first & 0x3fff) * 16; };
        start = field(0);
        leading = field(16);
        stride = field(32);
        vectors = 16u >> (bits >> 62 == 0 ? 4 : bits >> 62);
        constexpr uint64_t known = 0x3fff | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{3} << 62;
        if ((bits & ~known) != 0) {
            worker().fail(at, nullptr, "wgmma: a descriptor with a base offset, or with bits that mean nothing: %016llx",
                          static_cast<unsigned long long>(bits));
        }
        if (vectors > 1 && start / 16 / vectors % 8 != 0) {
            worker().fail(at, nullptr, "wgmma: a matrix with a swizzle of %u bytes begins at byte %zu of shared memory, "
                          "which is in none of the first rows of its pattern", 16 * vectors, start);
        }
    }

    // Where in shared memory the vector is that has element (row, k), `row` being the index that is not summed over:
    // "Canonical layouts" in units of vectors, then the swizzle, by bits of the address.
    size_t vector(unsigned row, unsigned k) const {
        const unsigned along = (transposed ? row : k) / 8, across = transposed ? k : row;
        size_t at = start + across % 8 * 16 * vectors;
        if (vectors > 1) {
            at += across / 8 * stride + along % vectors * 16 + along / vectors * leading;
        } else {
            at += across / 8 * (transposed ? leading : stride) + along * (transposed ? stride : leading);
        }
        return at ^ (at >> 7 & (vectors - 1)) << 4;
    }

    // Calls f(row, k, place) for each vector of `rows` rows from `first` on and 16 of k, by its first element.
    template <class F>
    void each_vector(unsigned first, unsigned rows, F f) const {
        for (unsigned row = first; row < first + rows; row += transposed ? 8 : 1) {
            for (unsigned k = 0; k < 16; k += transposed ? 1 : 8) f(row, k, vector(row, k));
        }
    }

    // The same elements; those of a row are `of_row` apart, those of k `of_k`.
    void load(double* to, unsigned first, unsigned rows, unsigned of_row, unsigned of_k) const {
        each_vector(first, rows, [&](unsigned row, unsigned k, size_t at) {
            uint16_t elements[8];
            memcpy(elements, worker().shared + at, sizeof elements);
            double* element = to + (row - first) * of_row + k * of_k;
            for (unsigned i = 0; i < 8; ++i, element += transposed ? of_row : of_k) {
                *element = __builtin_bit_cast(float, static_cast<uint32_t>(elements[i]) << 16);
            }
        });
    }
};

// Calls f with the place of each vector in shared memory that the warp reads.
template <class F>
void each_vector(const Warp& warp, const Product& product, F f) {
    auto all = [&](uint64_t descriptor, unsigned first, unsigned rows) {
        const Matrix matrix(descriptor, product.transposed, product.at);
        matrix.each_vector(first, rows, [&](unsigned, unsigned, size_t at) {
            if (at + 16 > kArena) {
                worker().fail(product.at, nullptr, "out of bounds: wgmma reads byte %zu of shared memory", at);
            }
            f(at);
        });
    };
    all(product.a, warp.index % kWarpgroup * kRows, kRows);
    all(product.b, 0, static_cast<unsigned>(product.columns));
}

// The sixteen rows of the product that the warp has.
void run(const Warp& warp, Product& product) {
    const Matrix a(product.a, product.transposed, product.at), b(product.b, product.transposed, product.at);
    double left[kRows * 16], right[16 * kColumns], d[kRows][kColumns];
    a.load(left, warp.index % kWarpgroup * kRows, kRows, 16, 1);
    for (int block = 0; block < product.columns / kColumns; ++block) {
        b.load(right, static_cast<unsigned>(block * kColumns), kColumns, 1, kColumns);
        auto each_sum = [&](auto f) {
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    f(d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)], product.sums[lane][4 * block + i]);
                }
            }
        };
        each_sum([](double& sum, float before) { sum = before; });
        accumulate(d, left, right, 16);
        each_sum([](double sum, float& after) { after = static_cast<float>(sum); });
    }
    product.done = true;
}

// Notes that a product reads what it reads, from now on or until now.
void mark_reads([[maybe_unused]] Worker& w, const Warp& warp, const Product& product, [[maybe_unused]] bool begins) {
    each_vector(warp, product, [&]([[maybe_unused]] size_t offset) {
#ifdef ECHOGRAD_CHECKED
        check_shared(w, offset, 16, false, false, product.at);
        for (Cell* cell = &w.cells[offset]; cell != &w.cells[offset] + 16; ++cell) {
            cell->products = static_cast<unsigned short>(cell->products + (begins ? 1 : -1));
            if (!begins) continue;
            const std::vector<unsigned>& fences = w.threads[cell->writer].fences;
            if (cell->fences >= fences.size() || fences[cell->fences] >= w.stamp) {
                w.fail(product.at, address_of(cell->write_at),
                       "race: a wgmma reads byte %zu of shared memory, behind whose write there is no fence of the "
                       "async proxy and a barrier", static_cast<size_t>(cell - w.cells.data()));
            }
        }
#endif
    });
}

// A thread ends: its warp's products must have ended before, and be as many as those of its warpgroup.
void Worker::leave_products() {
    const Warp& warp = *current->warp;
    if (!warp.products.empty()) fail(warp.products[0].at, nullptr, "race: returns while a wgmma is under way");
    const auto& all = begun[warp.index / kWarpgroup];
    if (warp.begun != all.size()) {
        fail(all.back().at, nullptr, "divergence: returns after %u of the %zu wgmma of its warpgroup", warp.begun,
             all.size());
    }
}

}  // namespace

// ---- The functions of emulator.h ----

#define ECHOGRAD_CALLER __builtin_extract_return_addr(__builtin_return_address(0))

uint3 thread_index() { return self().position; }
uint3 block_index() { return worker().block; }
dim3 block_size() { return worker().launch->block; }
dim3 grid_size() { return worker().launch->grid; }

int barrier(bool predicate, const char* name, Where where) {
    const void* at = ECHOGRAD_CALLER;
    Worker& w = worker();
    Thread& thread = *w.current;
    if (w.waiting == 0) {
        w.first_waiting = &thread;
    } else {
        const Thread& other = *w.first_waiting;
        if (!same(other.where, where)) {
            w.fail(at, other.at, "divergence: calls %s while thread (%u,%u,%u) waits in another %s",
                   name, other.position.x, other.position.y, other.position.z, other.call);
        }
    }
    thread.call = name;
    thread.where = where;
    thread.at = at;
    w.predicates += predicate;
    w.waiting += 1;
#ifdef ECHOGRAD_THREAD
    char* sync = &w.barrier_sync[w.stamp % 2];
    __tsan_release(sync);
#endif
    if (w.waiting == w.size) {
        w.release_barrier();
        w.draw_order();
    } else {
        thread.wait = Thread::Wait::Block;
    }
    w.block_thread();
#ifdef ECHOGRAD_THREAD
    __tsan_acquire(sync);
#endif
    return static_cast<int>(thread.result);
}

void warp_barrier(unsigned mask, Where where) {
#ifdef ECHOGRAD_THREAD
    Group& group = self().warp->groups[mask == 0 ? 0 : __builtin_ctz(mask)];
    char* sync = &group.sync[group.phase % 2];
    __tsan_release(sync);
#endif
    collective("__syncwarp", mask, where, ECHOGRAD_CALLER, [](Warp& warp, unsigned lanes) {
#ifdef ECHOGRAD_THREAD
        warp.groups[__builtin_ctz(lanes)].phase += 1;
#endif
        if (warp.time == 0) memset(warp.clock, 0, sizeof warp.clock);
        warp.time += 1;
        unsigned joined[kWarp] = {};
        each_lane(lanes, [&](unsigned lane) {
            warp.clock[lane][lane] = warp.time;
            for (unsigned other = 0; other < kWarp; ++other) {
                joined[other] = std::max(joined[other], warp.clock[lane][other]);
            }
        });
        each_lane(lanes, [&](unsigned lane) { memcpy(warp.clock[lane], joined, sizeof joined); });
    });
#ifdef ECHOGRAD_THREAD
    __tsan_acquire(sync);
#endif
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Where where) {
    static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                        "__shfl_xor_sync"};
    const void* at = ECHOGRAD_CALLER;
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        worker().fail(at, nullptr, "shuffle of width %d, which is not a power of two up to 32", width);
    }
    Thread& thread = self();
    thread.value = bits;
    thread.operand = operand;
    collective(names[static_cast<int>(kind)], mask, where, at, [=](Warp& warp, unsigned lanes) {
        each_lane(lanes, [&](unsigned lane) {
            Thread& to = warp.thread[lane];
            int first = static_cast<int>(lane) & ~(width - 1), last = first + width - 1;
            int from = static_cast<int>(lane);
            switch (kind) {
                case Shuffle::Index: from = first + (to.operand & (width - 1)); break;
                case Shuffle::Up: from -= to.operand; if (from < first) from = static_cast<int>(lane); break;
                case Shuffle::Down: from += to.operand; if (from > last) from = static_cast<int>(lane); break;
                case Shuffle::Xor: from ^= to.operand; if (from > last) from = static_cast<int>(lane); break;
            }
            if ((lanes >> (from & 31) & 1) == 0) {
                worker().fail(to.at, nullptr, "divergence: lane %u takes the value of lane %d, which the "
                              "mask %08x leaves out", lane, from, lanes);
            }
            to.result = warp.thread[from].value;
        });
    });
    return thread.result;
}

unsigned vote(Vote kind, unsigned mask, uint64_t value, Where where) {
    static const char* const names[] = {"__any_sync", "__all_sync", "__ballot_sync",
                                        "__match_any_sync"};
    Thread& thread = self();
    thread.value = value;
    collective(names[static_cast<int>(kind)], mask, where, ECHOGRAD_CALLER,
               [=](Warp& warp, unsigned lanes) {
        unsigned ballot = 0;
        each_lane(lanes, [&](unsigned lane) { ballot |= (warp.thread[lane].value != 0) * (1u << lane); });
        each_lane(lanes, [&](unsigned lane) {
            unsigned result = ballot;
            if (kind == Vote::Any) result = ballot != 0;
            if (kind == Vote::All) result = ballot == lanes;
            if (kind == Vote::MatchAny) {
                result = 0;
                each_lane(lanes, [&](unsigned other) {
                    result |= (warp.thread[other].value == warp.thread[lane].value) * (1u << other);
                });
            }
            warp.thread[lane].result = result;
        });
    });
    return static_cast<unsigned>(thread.result);
}

template <class Kind>
uint64_t combine(Kind kind, uint64_t x, uint64_t y) {
    switch (kind) {
        case Kind::Add: return x + y;
        case Kind::Min: return std::min(x, y);
        case Kind::Max: return std::max(x, y);
        case Kind::MinSigned:
            return static_cast<int32_t>(x) < static_cast<int32_t>(y) ? x : y;
        case Kind::MaxSigned:
            return static_cast<int32_t>(x) > static_cast<int32_t>(y) ? x : y;
        case Kind::And: return x & y;
        case Kind::Or: return x | y;
        case Kind::Xor: return x ^ y;
        default: return y;
    }
}

unsigned reduce(Reduce kind, unsigned mask, unsigned value, Where where) {
    static const char* const names[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                        "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
                                        "__reduce_or_sync",  "__reduce_xor_sync"};
    Thread& thread = self();
    thread.value = value;
    collective(names[static_cast<int>(kind)], mask, where, ECHOGRAD_CALLER,
               [=](Warp& warp, unsigned lanes) {
        uint64_t total = warp.thread[__builtin_ctz(lanes)].value;
        each_lane(lanes & (lanes - 1), [&](unsigned lane) {
            total = combine(kind, total, warp.thread[lane].value);
        });
        each_lane(lanes, [&](unsigned lane) { warp.thread[lane].result = total; });
    });
    return static_cast<unsigned>(thread.result);
}

template <class T>
T atomic_at(Atomic kind, T* address, T value, T compare) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    for (;;) {
        T next = kind == Atomic::Swap ? (old == compare ? value : old)
                                      : static_cast<T>(combine(kind, old, value));
        if (__atomic_compare_exchange_n(address, &old, next, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
            return old;
        }
    }
}

uint64_t atomic(Atomic kind, void* address, int bytes, uint64_t value, uint64_t compare) {
    const void* at = ECHOGRAD_CALLER;
    check_alignment(address, static_cast<size_t>(bytes), "an atomic", at);
    check(address, static_cast<size_t>(bytes), true, true, at);
    if (bytes == 4) {
        return atomic_at(kind, static_cast<uint32_t*>(address), static_cast<uint32_t>(value),
                         static_cast<uint32_t>(compare));
    }
    return atomic_at(kind, static_cast<uint64_t*>(address), value, compare);
}

void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

void trap() {
    worker().fail(ECHOGRAD_CALLER, nullptr, "__trap was called");
}

void* shared_array(const void* identity, const char* name, size_t bytes, Where where) {
    Worker& w = worker();
    size_t total = 0;
    for (const Array& array : w.arrays) {
        if (array.identity == identity) return w.shared + array.begin;
        if (array.identity != nullptr) total += array.bytes;
    }
    const void* at = ECHOGRAD_CALLER;
    if (total + bytes > kStaticLimit || total + bytes + w.launch->shared_bytes > kSharedLimit ||
        w.arrays.size() == kMaxArrays) {
        w.fail(at, nullptr, "too much shared memory: %zu bytes in %zu arrays and %zu dynamic; a block "
               "has %zu, %zu of them static", total + bytes, w.arrays.size(), w.launch->shared_bytes,
               kSharedLimit, kStaticLimit);
    }
    return w.shared + w.place(identity, name, bytes, where);
}

void* dynamic_shared(size_t element) {
    Worker& w = worker();
    if (w.launch->shared_bytes % element != 0) {
        w.fail(ECHOGRAD_CALLER, nullptr, "%zu bytes of dynamic shared memory are no whole number of "
               "elements of %zu", w.launch->shared_bytes, element);
    }
    return w.shared + w.arrays[0].begin;
}

void cp_async(void* shared, const void* global, int bytes, int valid) {
    const void* at = ECHOGRAD_CALLER;
    Worker& w = worker();
    Thread& thread = *w.current;
    size_t size = static_cast<size_t>(bytes);
    check_alignment(shared, size, "the target of cp.async", at);
    size_t offset = static_cast<size_t>(static_cast<char*>(shared) - w.shared);
    if (offset >= kArena) w.fail(at, nullptr, "cp.async to an address outside of shared memory");
    check(shared, size, true, false, at);
    // Also of a copy of nothing, whose address may be out of bounds.
    check_alignment(global, size, "the source of cp.async", at);
    if (valid > 0) check(global, static_cast<size_t>(valid), false, false, at);
    Copy copy{static_cast<char*>(shared), static_cast<const char*>(global),
              static_cast<unsigned short>(bytes), static_cast<unsigned short>(valid),
              thread.groups, (w.random.next() & 1) != 0};
    // The hardware may finish at once or as late as the wait; both happen here.
    if (copy.moved) {
        move(copy);
    } else {
        memset(shared, 0xff, size);
    }
    mark_pending(w, copy, true);
    thread.copies.push_back(copy);
}

void cp_async_commit() { self().groups += 1; }

void cp_async_wait(int pending_groups) {
    Worker& w = worker();
    Thread& thread = *w.current;
    auto done = [&](const Copy& copy) {
        return copy.group + static_cast<unsigned>(pending_groups) < thread.groups;
    };
    auto& copies = thread.copies;  // in the order of their groups
    auto rest = std::find_if_not(copies.begin(), copies.end(), done);
    std::for_each(copies.begin(), rest, [&](const Copy& copy) { complete(w, copy); });
    copies.erase(copies.begin(), rest);
}

void ldmatrix(unsigned* fragments, int matrices, bool transpose, const void* row, Where where) {
    const void* at = ECHOGRAD_CALLER;
    Thread& thread = self();
    if (thread.lane < 8 * matrices) check_alignment(row, 16, "a row of ldmatrix", at);
    thread.value = reinterpret_cast<uintptr_t>(row);
    const char* rows[kWarp];
    thread.pointers[0] = rows;
    collective("ldmatrix", ~0u, where, at, [](Warp& warp, unsigned lanes) {
        each_lane(lanes, [&](unsigned lane) {
            auto to = static_cast<const char**>(const_cast<void*>(warp.thread[lane].pointers[0]));
            for (unsigned from = 0; from < kWarp; ++from) {
                to[from] = reinterpret_cast<const char*>(warp.thread[from].value);
            }
        });
    });
    for (int m = 0; m < matrices; ++m) {
        if (transpose) {
            uint16_t pair[2];
            for (int half = 0; half < 2; ++half) {
                const char* from = rows[8 * m + 2 * (thread.lane % 4) + half] + 2 * (thread.lane / 4);
                check(from, 2, false, false, at);
                memcpy(&pair[half], from, 2);
            }
            fragments[m] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
        } else {
            const char* from = rows[8 * m + thread.lane / 4] + 4 * (thread.lane % 4);
            check(from, 4, false, false, at);
            memcpy(&fragments[m], from, 4);
        }
    }
}

void mma(Element element, float* d, const unsigned* a, const unsigned* b, Where where) {
    Thread& thread = self();
    thread.pointers[0] = a;
    thread.pointers[1] = b;
    thread.pointers[2] = d;
    auto function = [element](Warp& warp, unsigned) {
        switch (element) {
            case Element::Bf16: return multiply<Element::Bf16>(warp);
            case Element::F16: return multiply<Element::F16>(warp);
            case Element::Tf32: return multiply<Element::Tf32>(warp);
        }
    };
    collective(element == Element::Tf32 ? "mma.m16n8k8" : "mma.m16n8k16", ~0u, where, ECHOGRAD_CALLER,
               function);
}

unsigned shared_address(const void* shared) {
    const size_t offset = static_cast<size_t>(static_cast<const char*>(shared) - worker().shared);
    if (offset >= kArena) worker().fail(ECHOGRAD_CALLER, nullptr, "wgmma: a matrix outside of shared memory");
    return static_cast<unsigned>(offset);
}

void async_proxy_fence() { self().fences.push_back(worker().stamp); }

void wgmma_fence(Where where) {
    collective("wgmma.fence", ~0u, where, ECHOGRAD_CALLER, [](Warp& warp, unsigned) { warp.fenced = true; });
}

void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool transposed, Where where) {
    const void* at = ECHOGRAD_CALLER;
    Thread& thread = self();
    thread.value = a;
    thread.result = b;
    thread.pointers[2] = d;
    collective("wgmma", ~0u, where, at, [=](Warp& warp, unsigned lanes) {
        Worker& w = worker();
        Product product{{}, a, b, columns, transposed, false, warp.groups_of_products, at};
        if ((warp.index / kWarpgroup + 1) * kWarpgroup * kWarp > w.size) {
            w.fail(at, nullptr, "wgmma by %u threads, no warpgroup", w.size % (kWarpgroup * kWarp));
        }
        if (!warp.fenced) w.fail(at, nullptr, "race: a wgmma without wgmma.fence since the last wait");
        auto& all = w.begun[warp.index / kWarpgroup];
        if (warp.begun == all.size()) all.push_back(product);
        const Product& first = all[warp.begun++];
        for (unsigned i = 0; i < kWarpgroup; ++i) {
            const Warp& other = w.warps[warp.index / kWarpgroup * kWarpgroup + i];
            if (other.exited != 0 && other.begun < warp.begun) {
                w.fail(at, nullptr, "divergence: calls the %uth wgmma of its warpgroup, of which a warp has returned after %u",
                       warp.begun, other.begun);
            }
        }
        each_lane(lanes, [&](unsigned lane) {
            const Thread& other = warp.thread[lane];
            if (other.value != first.a || other.result != first.b || columns != first.columns) {
                w.fail(at, first.at, "divergence: a wgmma of other matrices than those of its warpgroup");
            }
            product.sums[lane] = static_cast<float*>(const_cast<void*>(other.pointers[2]));
        });
        mark_reads(w, warp, product, true);
        warp.products.push_back(product);
        // The hardware may be done at once or as late as the wait; both happen here.
        if ((w.random.next() & 1) != 0) {
            for (Product& each : warp.products) {
                if (!each.done) run(warp, each);
            }
        }
    });
}

void wgmma_commit(Where where) {
    collective("wgmma.commit_group", ~0u, where, ECHOGRAD_CALLER,
               [](Warp& warp, unsigned) { warp.groups_of_products += 1; });
}

void wgmma_wait(int pending_groups, Where where) {
    collective("wgmma.wait_group", ~0u, where, ECHOGRAD_CALLER, [=](Warp& warp, unsigned) {
        auto& products = warp.products;  // in the order of their groups
        auto rest = std::find_if_not(products.begin(), products.end(), [&](const Product& product) {
            return product.group + static_cast<unsigned>(pending_groups) < warp.groups_of_products;
        });
        std::for_each(products.begin(), rest, [&](Product& product) {
            if (!product.done) run(warp, product);
            mark_reads(worker(), warp, product, false);
        });
        products.erase(products.begin(), rest);
        warp.fenced = false;
    });
}

// ---- Blocks ----

namespace {

void Worker::run() {
    const dim3 dims = launch->block;
    size = alive = dims.x * dims.y * dims.z;
    waiting = 0;
    predicates = 0;
    failed = false;
    known = {1, 0};
    if (stamp > UINT32_MAX / 2) {
        std::fill(cells.begin(), cells.end(), Cell{});
        stamp = 1;
    }
    first_stamp = ++stamp;
    arrays.clear();
    std::fill_n(owner.begin(), kFirst / kLine, static_cast<unsigned char>(0));
    shared_end = kFirst;
#ifdef ECHOGRAD_ADDRESS
    __asan_poison_memory_region(shared, kArena);
#endif
    place(nullptr, "DYNAMIC_SHARED", launch->shared_bytes, Where::current());
    for (unsigned i = 0; i < size; ++i) {
        Thread& thread = threads[i];
        thread.index = static_cast<unsigned short>(i);
        thread.lane = i % kWarp;
        thread.warp = &warps[i / kWarp];
        thread.position = {i % dims.x, i / dims.x % dims.y, i / (dims.x * dims.y)};
        thread.started = thread.exited = false;
        thread.wait = Thread::Wait::None;
        thread.copies.clear();
        thread.groups = 0;
        thread.fences.clear();
    }
    for (unsigned i = 0; i * kWarp < size; ++i) {
        Warp& warp = warps[i];
        unsigned lanes = std::min(kWarp, size - i * kWarp);
        warp.index = i;
        warp.lanes = warp.runnable = lanes == kWarp ? ~0u : (1u << lanes) - 1;
        warp.exited = 0;
        warp.time = 0;
        warp.thread = &threads[i * kWarp];
        warp.groups_of_products = warp.begun = 0;
        warp.fenced = false;
        for (Group& group : warp.groups) group.arrived = 0;
    }
    draw_order();
    Thread& first = *pick();
    enter(first);
#ifdef ECHOGRAD_ADDRESS
    switch_begin(&host_fake, first.stack->low, kStack);
#endif
#ifdef ECHOGRAD_THREAD
    host_fiber = __tsan_get_current_fiber();
    // A fiber comes after what the one that creates it has done: none may create another.
    for (unsigned i = 0; i < size; ++i) {
        if (threads[i].fiber == nullptr) threads[i].fiber = __tsan_create_fiber(0);
    }
    __tsan_acquire(&end_sync);
    __tsan_release(&begin_sync);
    announce(first);
#endif
    Context::swap(host, first.context);
#ifdef ECHOGRAD_ADDRESS
    switch_end(host_fake);
#endif
    current = nullptr;
    for (auto& all : begun) all.clear();
    if (failed) {  // the stacks and products of abandoned threads
        for (Warp& warp : warps) warp.products.clear();
        for (Cell& cell : cells) cell.products = 0;
        for (unsigned i = 0; i < size; ++i) {
            Stack*& stack = threads[i].stack;
            if (stack == nullptr) continue;
#ifdef ECHOGRAD_ADDRESS
            __asan_unpoison_memory_region(stack->low, kStack);
#endif
#ifndef ECHOGRAD_THREAD
            spare.push_back(stack);
#endif
            stack = nullptr;
        }
    }
#ifdef ECHOGRAD_ADDRESS
    __asan_unpoison_memory_region(shared, kArena);
#endif
}

}  // namespace

// Tells AddressSanitizer that memory between buffers is nobody's, or no longer so.
extern "C" void echograd_emulator_guard([[maybe_unused]] char* start, [[maybe_unused]] size_t bytes,
                                        [[maybe_unused]] bool closed) {
#ifdef ECHOGRAD_ADDRESS
    (closed ? __asan_poison_memory_region : __asan_unpoison_memory_region)(start, bytes);
#endif
}

#ifdef ECHOGRAD_THREAD
static char launch_begin, launch_end;

// Rust code is not instrumented, so its locks are invisible while its calls of memcpy are not. The
// stacks of fibers have no such frames.
extern "C" const char* __tsan_default_suppressions() {
    return "race:/rustc/\nrace:library/core\nrace:library/alloc\nrace:library/std\nrace:.cargo/\n";
}
#endif

// Called before and after the blocks of a launch, which come after everything that its caller did and
// before what it does next.
extern "C" void echograd_emulator_begin() {
#ifdef ECHOGRAD_THREAD
    __tsan_release(&launch_begin);
#endif
}
extern "C" void echograd_emulator_end() {
#ifdef ECHOGRAD_THREAD
    __tsan_acquire(&launch_end);
#endif
}

// Runs block number `index` (x fastest) of a launch; false if the report has been filled in.
extern "C" bool echograd_emulator_block(const LaunchSpec* launch, uint64_t index, Report* report) {
    static thread_local std::unique_ptr<Worker> own;
    if (!own) own = std::make_unique<Worker>();
    tls_worker = own.get();
    Worker& w = *own;
    if (w.stack_memory == nullptr || w.shared == nullptr) {
        snprintf(report->message, sizeof report->message, "no memory for the emulator's stacks");
        report->at = report->other = nullptr;
        return false;
    }
    w.launch = launch;
    w.report = report;
    const dim3 grid = launch->grid;
    w.block = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
               static_cast<unsigned>(index / grid.x / grid.y)};
    w.random = {launch->seed * 0x9e3779b97f4a7c15u ^ index * 0xd1b54a32d192ed03u};
#ifdef ECHOGRAD_THREAD
    __tsan_acquire(&launch_begin);
#endif
    w.run();
#ifdef ECHOGRAD_THREAD
    __tsan_acquire(&w.end_sync);
    __tsan_release(&launch_end);
#endif
    return !w.failed;
}

}  // namespace emulator

// ---- Instrumentation ----

#ifdef ECHOGRAD_CHECKED
using emulator::check;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ECHOGRAD_HOOK(bytes)                                                                    \
    void __tsan_read##bytes(void* p) { check(p, bytes, false, false, ECHOGRAD_CALLER); }        \
    void __tsan_write##bytes(void* p) { check(p, bytes, true, false, ECHOGRAD_CALLER); }        \
    void __tsan_unaligned_read##bytes(void* p) { check(p, bytes, false, false, ECHOGRAD_CALLER); } \
    void __tsan_unaligned_write##bytes(void* p) { check(p, bytes, true, false, ECHOGRAD_CALLER); } \
    void __tsan_volatile_read##bytes(void* p) { check(p, bytes, false, false, ECHOGRAD_CALLER); } \
    void __tsan_volatile_write##bytes(void* p) { check(p, bytes, true, false, ECHOGRAD_CALLER); }
ECHOGRAD_HOOK(1)
ECHOGRAD_HOOK(2)
ECHOGRAD_HOOK(4)
ECHOGRAD_HOOK(8)
ECHOGRAD_HOOK(16)
void __tsan_read_range(void* p, size_t bytes) { check(p, bytes, false, false, ECHOGRAD_CALLER); }
void __tsan_write_range(void* p, size_t bytes) { check(p, bytes, true, false, ECHOGRAD_CALLER); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    check(from, bytes, false, false, ECHOGRAD_CALLER);
    check(to, bytes, true, false, ECHOGRAD_CALLER);
    return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    check(from, bytes, false, false, ECHOGRAD_CALLER);
    check(to, bytes, true, false, ECHOGRAD_CALLER);
    return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
    check(to, bytes, true, false, ECHOGRAD_CALLER);
    return memset(to, value, bytes);
}

// What the compiler passes to the handlers of -fsanitize=undefined.
struct UbsanType {
    uint16_t kind, info;
    char name[];
};
struct UbsanLocation {
    const char* file;
    uint32_t line, column;
};
struct UbsanMismatch {
    UbsanLocation location;
    const UbsanType* type;
    unsigned char log_alignment, kind;
};
struct UbsanBounds {
    UbsanLocation location;
    const UbsanType *array, *index;
};

static void undefined(const char* what, const void* at) {
    emulator::worker().fail(at, nullptr, "%s", what);
}
void __ubsan_handle_type_mismatch_v1(UbsanMismatch* data, void* pointer) {
    size_t alignment = size_t{1} << data->log_alignment;
    emulator::worker().fail(ECHOGRAD_CALLER, nullptr,
                            "misaligned: %s needs an address divisible by %zu, %p is not",
                            data->type->name, alignment, pointer);
}
void __ubsan_handle_out_of_bounds(UbsanBounds* data, uintptr_t index) {
    emulator::worker().fail(ECHOGRAD_CALLER, nullptr, "out of bounds: index %lld of an array %s",
                            static_cast<long long>(index), data->array->name);
}
void __ubsan_handle_add_overflow(void*, uintptr_t, uintptr_t) {
    undefined("signed integer overflow in an addition", ECHOGRAD_CALLER);
}
void __ubsan_handle_sub_overflow(void*, uintptr_t, uintptr_t) {
    undefined("signed integer overflow in a subtraction", ECHOGRAD_CALLER);
}
void __ubsan_handle_mul_overflow(void*, uintptr_t, uintptr_t) {
    undefined("signed integer overflow in a multiplication", ECHOGRAD_CALLER);
}
void __ubsan_handle_negate_overflow(void*, uintptr_t) {
    undefined("signed integer overflow in a negation", ECHOGRAD_CALLER);
}
void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
    undefined("integer division by zero", ECHOGRAD_CALLER);
}
void __ubsan_handle_shift_out_of_bounds(void*, uintptr_t, uintptr_t) {
    undefined("shift by as many bits as the type has, or more", ECHOGRAD_CALLER);
}
}
#endif
