// A CUDA driver without a GPU, for tests: memory is malloc's, a few kernels are loops.
//
// Work is done as late as the driver may: copies, fills and kernels wait in their stream until
// something waits for them, so that memory that is used again or given back too early shows. Every
// argument is checked; at exit a report goes to the file FAKE_REPORT: what was done wrong and what was
// not released, one line each, then one line per kernel launched and how often.
//
// FAKE_VERSION (13000), FAKE_DEVICES (1), FAKE_CAPABILITY (90), FAKE_MEMORY (bytes, 256 MiB) say
// what there is; FAKE_INIT, FAKE_OPEN, FAKE_LOAD make that step answer the given error;
// FAKE_REFUSE=NAME refuses the first launch of a kernel (701); FAKE_CRASH=NAME lets that kernel
// access an illegal address (700). -DWITHOUT_PARAMETERS and -DWITHOUT_GRAPHS leave out a symbol.
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK, INVALID, NO_MEMORY, NO_DEVICE = 100, NOT_FOUND = 500, NOT_READY = 600, CRASHED = 700,
       NO_RESOURCES = 701, CAPTURED = 900, BROKEN_CAPTURE = 901 };
enum { PIECES = 4096, WORK = 4096 };

static FILE* report;
static int crashed, refused;
static _Thread_local int current;
static int retained;

// A line of the report; an error to be answered.
__attribute__((format(printf, 1, 2))) static int wrong(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(report, format, arguments);
    va_end(arguments);
    fputc('\n', report);
    return INVALID;
}

static long number(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text ? atol(text) : otherwise;
}

// ---- Everything that must be released, by kind ----

enum Kind { DEVICE, PINNED, STREAM, EVENT, MODULE, GRAPH, EXECUTABLE, KINDS };
static const char* kKinds[KINDS] = {"device memory", "pinned memory", "streams", "events",
                                    "modules", "graphs", "executable graphs"};
static struct Piece {
    char* start;
    size_t bytes;
    enum Kind kind;
} pieces[PIECES];
static size_t used;

static struct Piece* find(const void* start, enum Kind kind) {
    for (int i = 0; i < PIECES; ++i)
        if (pieces[i].start && pieces[i].start == start && pieces[i].kind == kind) return &pieces[i];
    return NULL;
}

static void* add(size_t bytes, enum Kind kind) {
    for (int i = 0; i < PIECES; ++i) {
        if (pieces[i].start) continue;
        char* start = aligned_alloc(256, (bytes + 255) / 256 * 256);
        // Not zeros, which whoever forgets to clear would like.
        memset(start, 0xa5, bytes);
        pieces[i] = (struct Piece){start, bytes, kind};
        if (kind == DEVICE) used += bytes;
        return start;
    }
    abort();
}

static int drop(const void* start, enum Kind kind) {
    struct Piece* piece = find(start, kind);
    if (!piece) return wrong("%s at %p: released twice or never made", kKinds[kind], start);
    if (kind == DEVICE) used -= piece->bytes;
    // Whoever uses it later finds other bytes.
    memset(piece->start, 0x5a, piece->bytes);
    free(piece->start);
    piece->start = NULL;
    return OK;
}

static int within(const void* at, size_t bytes, enum Kind kind) {
    for (int i = 0; i < PIECES; ++i) {
        const struct Piece* p = &pieces[i];
        if (p->start && p->kind == kind && (char*)at >= p->start && (char*)at + bytes <= p->start + p->bytes)
            return 1;
    }
    wrong("%zu bytes at %p are no %s", bytes, at, kKinds[kind]);
    return 0;
}

// ---- Kernels ----

static float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void scale(void** args, float factor, int is_narrow) {
    char *x = *(char**)args[0], *y = *(char**)args[1];
    size_t n = *(uint64_t*)args[2], size = is_narrow ? 2 : 4;
    if (!within(x, n * size, DEVICE) || !within(y, n * size, DEVICE)) return;
    for (size_t i = 0; i < n; ++i) {
        if (is_narrow) ((uint16_t*)y)[i] = narrow(factor * widen(((uint16_t*)x)[i]));
        else ((float*)y)[i] = factor * ((float*)x)[i];
    }
}

static void copy_f32(void** args) { scale(args, 1, 0); }
static void copy_bf16(void** args) { scale(args, 1, 1); }
static void scale_f32(void** args) { scale(args, *(float*)args[3], 0); }
static void scale_bf16(void** args) { scale(args, *(float*)args[3], 1); }
static void nothing(void** args) { (void)args; }

static struct Kernel {
    const char* name;
    void (*run)(void**);
    size_t parameters, sizes[4];
    int shared, launches;
} kernels[] = {
    {"copy_f32", copy_f32, 3, {8, 8, 8}, 0, 0},
    {"copy_bf16", copy_bf16, 3, {8, 8, 8}, 0, 0},
    {"scale_f32", scale_f32, 4, {8, 8, 8, 4}, 0, 0},
    {"scale_bf16", scale_bf16, 4, {8, 8, 8, 4}, 0, 0},
    // Takes nothing, wants much shared memory.
    {"fake_shared", nothing, 0, {0}, 1024, 0},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };
static int permitted[KERNELS];

// ---- Streams: work that waits ----

struct Work {
    enum { COPY_IN, COPY_OUT, COPY, FILL, RUN, RECORD, WAIT } what;
    char *to, *from;
    size_t bytes;
    struct Kernel* kernel;
    uint64_t words[4];
};
struct Queue {
    struct Work work[WORK];
    int length;
};
// A graph under way, and the stream that it is captured from.
static struct Queue *capturing, *captured;
static int broken;

// An event has happened where nothing is ahead of it in the stream in which it was recorded.
struct Event {
    int happened;
    struct Queue* in;
};

static int push(struct Queue* queue, struct Work work) {
    if (capturing && queue == captured) queue = capturing;
    if (queue->length == WORK) abort();
    queue->work[queue->length++] = work;
    return OK;
}

static int work_off(struct Queue* queue, void* event);

static void run(struct Work* work) {
    switch (work->what) {
        case COPY_IN:
            if (within(work->from, work->bytes, PINNED) && within(work->to, work->bytes, DEVICE))
                memcpy(work->to, work->from, work->bytes);
            break;
        case COPY_OUT:
            if (within(work->from, work->bytes, DEVICE) && within(work->to, work->bytes, PINNED))
                memcpy(work->to, work->from, work->bytes);
            break;
        case COPY:
            if (within(work->from, work->bytes, DEVICE) && within(work->to, work->bytes, DEVICE))
                memmove(work->to, work->from, work->bytes);
            break;
        case FILL:
            if (within(work->to, work->bytes, DEVICE)) memset(work->to, 0, work->bytes);
            break;
        case RUN: {
            void* args[4];
            for (int i = 0; i < 4; ++i) args[i] = &work->words[i];
            const char* bad = getenv("FAKE_CRASH");
            if (bad && !strcmp(bad, work->kernel->name)) crashed = CRASHED;
            else work->kernel->run(args);
            break;
        }
        case RECORD:
            ((struct Event*)work->to)->happened = 1;
            break;
        case WAIT:
            work_off(((struct Event*)work->to)->in, work->to);
    }
}

// Does what is queued in a stream, up to `event` if that is not null.
static int work_off(struct Queue* queue, void* event) {
    if (event && ((struct Event*)event)->happened) return crashed;
    int done = 0;
    while (done < queue->length) {
        struct Work* work = &queue->work[done++];
        if (!crashed) run(work);
        if (event && work->what == RECORD && work->to == event) break;
    }
    memmove(queue->work, queue->work + done, sizeof(struct Work) * (queue->length - done));
    queue->length -= done;
    return crashed;
}

// Whether anything is queued in any stream.
static int is_busy(void) {
    for (int i = 0; i < PIECES; ++i)
        if (pieces[i].start && pieces[i].kind == STREAM && ((struct Queue*)pieces[i].start)->length) return 1;
    return 0;
}

// ---- The driver's functions ----

#define API __attribute__((visibility("default"))) int

// What every call but the first few demands.
#define ENTER                                                   \
    do {                                                        \
        if (!current) {                                         \
            wrong("%s: no context is current", __func__);       \
            return 201;                                         \
        }                                                       \
        if (crashed) return crashed;                            \
    } while (0)
#define ENTER_UNCAPTURED                                        \
    ENTER;                                                      \
    do {                                                        \
        if (capturing) {                                        \
            broken = 1;                                         \
            wrong("%s while capturing", __func__);              \
            return CAPTURED;                                    \
        }                                                       \
    } while (0)

__attribute__((constructor)) static void begin(void) {
    const char* path = getenv("FAKE_REPORT");
    report = fopen(path ? path : "/dev/null", "w");
    setvbuf(report, NULL, _IOLBF, 0);
}

__attribute__((destructor)) static void end(void) {
    int left[KINDS] = {0};
    for (int i = 0; i < PIECES; ++i)
        if (pieces[i].start) ++left[pieces[i].kind];
    for (int kind = 0; kind < KINDS; ++kind)
        if (left[kind]) fprintf(report, "%s not released: %d\n", kKinds[kind], left[kind]);
    if (retained) fprintf(report, "contexts not released: %d\n", retained);
    for (int i = 0; i < KERNELS; ++i)
        if (kernels[i].launches) fprintf(report, "%s: %d\n", kernels[i].name, kernels[i].launches);
    fclose(report);
}

API cuDriverGetVersion(int* version) { return *version = number("FAKE_VERSION", 13000), OK; }
API cuInit(unsigned flags) {
    long devices = number("FAKE_DEVICES", 1);
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (flags) return INVALID;
    if (getenv("FAKE_INIT")) return number("FAKE_INIT", 0);
    return devices && !(visible && !*visible) ? OK : NO_DEVICE;
}
API cuDeviceGetCount(int* count) { return *count = number("FAKE_DEVICES", 1), OK; }
API cuDeviceGet(int* device, int index) { return *device = 10 + index, OK; }
API cuDeviceGetName(char* name, int room, int device) {
    return snprintf(name, room, "Imaginary GPU %d", device - 10), OK;
}
API cuDeviceTotalMem_v2(size_t* bytes, int device) {
    return *bytes = number("FAKE_MEMORY", 256 << 20), device < 10;
}
API cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device < 10) return INVALID;
    int capability = number("FAKE_CAPABILITY", 90);
    switch (attribute) {
        case 75: return *value = capability / 10, OK;
        case 76: return *value = capability % 10, OK;
        case 13: return *value = 1000000, OK;
        case 16: return *value = 4, OK;
        case 38: return *value = 1 << 20, OK;
        case 39: return *value = 2048, OK;
        case 81: return *value = 233472, OK;
        case 82: return *value = 65536, OK;
        case 97: return *value = 232448, OK;
    }
    return INVALID;
}
API cuDevicePrimaryCtxRetain(void** context, int device) {
    if (getenv("FAKE_OPEN")) return number("FAKE_OPEN", 0);
    ++retained;
    return *context = &retained, device < 10;
}
API cuDevicePrimaryCtxRelease_v2(int device) { return --retained, device < 10; }
API cuCtxSetCurrent(void* context) { return current = context == &retained, !current; }
API cuGetErrorName(int error, const char** text) {
    switch (error) {
        case INVALID: return *text = "CUDA_ERROR_INVALID_VALUE", OK;
        case NO_MEMORY: return *text = "CUDA_ERROR_OUT_OF_MEMORY", OK;
        case 46: return *text = "CUDA_ERROR_DEVICE_UNAVAILABLE", OK;
        case 209: return *text = "CUDA_ERROR_NO_BINARY_FOR_GPU", OK;
        case CRASHED: return *text = "CUDA_ERROR_ILLEGAL_ADDRESS", OK;
        case NO_RESOURCES: return *text = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", OK;
        case 999: return *text = "CUDA_ERROR_UNKNOWN", OK;
    }
    return INVALID;
}
API cuGetErrorString(int error, const char** text) {
    static char buffer[64];
    if (cuGetErrorName(error, text)) return INVALID;
    return snprintf(buffer, sizeof buffer, "answer %d", error), *text = buffer, OK;
}

API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ENTER_UNCAPTURED;
    if (!bytes) return wrong("cuMemAlloc of nothing");
    if (used + bytes > (size_t)number("FAKE_MEMORY", 256 << 20)) return NO_MEMORY;
    return *address = (uint64_t)add(bytes, DEVICE), OK;
}
API cuMemFree_v2(uint64_t address) {
    if (!current) return wrong("cuMemFree: no context is current");
    if (is_busy() && !crashed) wrong("cuMemFree while work is queued");
    return drop((void*)address, DEVICE);
}
API cuMemGetInfo_v2(size_t* left, size_t* total) {
    ENTER;
    *total = number("FAKE_MEMORY", 256 << 20);
    return *left = *total - used, OK;
}
API cuMemHostAlloc(void** host, size_t bytes, unsigned flags) {
    ENTER_UNCAPTURED;
    if (flags) return wrong("cuMemHostAlloc: flags %u", flags);
    return *host = add(bytes, PINNED), OK;
}
API cuMemFreeHost(void* host) { return drop(host, PINNED); }
API cuStreamCreate(void** made, unsigned flags) {
    ENTER_UNCAPTURED;
    if (flags != 1) return wrong("cuStreamCreate: flags %u", flags);
    *made = add(sizeof(struct Queue), STREAM);
    return ((struct Queue*)*made)->length = 0, OK;
}
API cuStreamDestroy_v2(void* which) { return drop(which, STREAM); }

// Copies, fills and records need a stream.
#define QUEUE(...)                                                                         \
    if (!find(on, STREAM)) return wrong("%s: no such stream", __func__);                   \
    return push(on, (struct Work){__VA_ARGS__})

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* on) {
    ENTER_UNCAPTURED;
    if (!within(from, bytes, PINNED) || !within((void*)to, bytes, DEVICE)) return INVALID;
    QUEUE(.what = COPY_IN, .to = (char*)to, .from = (char*)from, .bytes = bytes);
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* on) {
    ENTER_UNCAPTURED;
    if (!within(to, bytes, PINNED) || !within((void*)from, bytes, DEVICE)) return INVALID;
    QUEUE(.what = COPY_OUT, .to = to, .from = (char*)from, .bytes = bytes);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* on) {
    ENTER_UNCAPTURED;
    if (!within((void*)to, bytes, DEVICE) || !within((void*)from, bytes, DEVICE)) return INVALID;
    QUEUE(.what = COPY, .to = (char*)to, .from = (char*)from, .bytes = bytes);
}
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* on) {
    ENTER;
    if (value || !within((void*)to, bytes, DEVICE)) return wrong("cuMemsetD8Async");
    QUEUE(.what = FILL, .to = (char*)to, .bytes = bytes);
}

API cuEventCreate(void** event, unsigned flags) {
    ENTER_UNCAPTURED;
    if (flags & ~2u) return wrong("cuEventCreate: flags %u", flags);
    *event = add(sizeof(struct Event), EVENT);
    return *(struct Event*)*event = (struct Event){1, NULL}, OK;
}
API cuEventDestroy_v2(void* event) { return drop(event, EVENT); }
API cuEventRecord(void* event, void* on) {
    ENTER_UNCAPTURED;
    if (!find(event, EVENT)) return wrong("cuEventRecord: no such event");
    *(struct Event*)event = (struct Event){0, on};
    QUEUE(.what = RECORD, .to = event);
}
API cuEventSynchronize(void* event) {
    ENTER_UNCAPTURED;
    if (!find(event, EVENT)) return wrong("cuEventSynchronize: no such event");
    return work_off(((struct Event*)event)->in, event);
}
API cuStreamWaitEvent(void* on, void* event, unsigned flags) {
    ENTER_UNCAPTURED;
    if (flags || !find(event, EVENT)) return wrong("cuStreamWaitEvent: flags %u", flags);
    QUEUE(.what = WAIT, .to = event);
}
API cuEventElapsedTime(float* time, void* from, void* to) {
    ENTER_UNCAPTURED;
    if (!find(from, EVENT) || !find(to, EVENT)) return wrong("cuEventElapsedTime: no such event");
    *time = 0.5f;
    return ((struct Event*)from)->happened && ((struct Event*)to)->happened ? OK : NOT_READY;
}
API cuStreamSynchronize(void* on) {
    ENTER_UNCAPTURED;
    return find(on, STREAM) ? work_off(on, NULL) : wrong("cuStreamSynchronize: no such stream");
}

API cuModuleLoadData(void** module, const void* image) {
    ENTER_UNCAPTURED;
    uint32_t magic;
    memcpy(&magic, image, 4);
    if (getenv("FAKE_LOAD")) return number("FAKE_LOAD", 0);
    if ((uintptr_t)image % 8) return wrong("cuModuleLoadData: misaligned");
    // A fatbin, an ELF file, or what the fake compiler makes.
    if (magic != 0xba55ed50 && magic != 0x464c457f && memcmp(image, "code", 4))
        return wrong("cuModuleLoadData: unknown format %x", magic);
    return *module = add(1, MODULE), OK;
}
API cuModuleUnload(void* module) { return drop(module, MODULE); }
API cuModuleGetFunction(struct Kernel** function, void* module, const char* name) {
    ENTER_UNCAPTURED;
    if (!find(module, MODULE)) return wrong("cuModuleGetFunction: no such module");
    for (int i = 0; i < KERNELS; ++i)
        if (!strcmp(kernels[i].name, name)) return *function = &kernels[i], OK;
    return NOT_FOUND;
}
API cuFuncGetAttribute(int* value, int attribute, struct Kernel* function) {
    ENTER;
    switch (attribute) {
        case 0: return *value = 1024, OK;
        case 1: return *value = function->shared, OK;
        case 3: return *value = 0, OK;
        case 4: return *value = 32, OK;
    }
    return INVALID;
}
API cuFuncSetAttribute(struct Kernel* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value + function->shared > 232448) return wrong("cuFuncSetAttribute");
    return permitted[function - kernels] = value, OK;
}
#ifndef WITHOUT_PARAMETERS
API cuFuncGetParamInfo(struct Kernel* function, size_t index, size_t* offset, size_t* size) {
    ENTER;
    if (index >= function->parameters) return INVALID;
    *offset = index * 8;
    return *size = function->sizes[index], OK;
}
#endif
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, struct Kernel* function, int threads,
                                                size_t shared) {
    ENTER;
    size_t whole = shared + function->shared;
    if (whole > 49152 && (int)shared > permitted[function - kernels]) return wrong("occupancy: no leave");
    int by_shared = whole ? 233472 / whole : 32;
    return *blocks = by_shared < 2048 / threads ? by_shared : 2048 / threads, OK;
}
API cuLaunchKernel(struct Kernel* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* on, void** arguments, void** extra) {
    ENTER;
    const char* refuse = getenv("FAKE_REFUSE");
    if (refuse && !strcmp(refuse, function->name) && !refused++) return NO_RESOURCES;
    if (!x || !y || !z || !bx || !by || !bz || bx * by * bz > 1024 || extra)
        return wrong("%s: grid %u,%u,%u of %u,%u,%u", function->name, x, y, z, bx, by, bz);
    if (shared + function->shared > 49152 && (int)shared > permitted[function - kernels])
        return wrong("%s: no leave for %u bytes of shared memory", function->name, shared);
    struct Work work = {.what = RUN, .kernel = function};
    for (size_t i = 0; i < function->parameters; ++i)
        memcpy(&work.words[i], arguments[i], function->sizes[i]);
    if (!find(on, STREAM)) return wrong("cuLaunchKernel: no such stream");
    if (!capturing) ++function->launches;
    push(on, work);
    const char* blocking = getenv("CUDA_LAUNCH_BLOCKING");
    return blocking && *blocking == '1' && !capturing ? work_off(on, NULL) : OK;
}

API cuStreamBeginCapture_v2(void* on, int mode) {
    ENTER_UNCAPTURED;
    if (mode != 1 || !find(on, STREAM)) return wrong("cuStreamBeginCapture: mode %d", mode);
    capturing = add(sizeof(struct Queue), GRAPH);
    captured = on;
    return capturing->length = broken = 0, OK;
}
API cuStreamEndCapture(void* on, void** graph) {
    ENTER;
    if (!capturing || !find(on, STREAM)) return wrong("cuStreamEndCapture without a capture");
    *graph = capturing;
    capturing = NULL;
    if (!broken) return OK;
    drop(*graph, GRAPH);
    return *graph = NULL, BROKEN_CAPTURE;
}
#ifndef WITHOUT_GRAPHS
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    ENTER_UNCAPTURED;
    if (flags || !find(graph, GRAPH)) return wrong("cuGraphInstantiate");
    *executable = add(sizeof(struct Queue), EXECUTABLE);
    return memcpy(*executable, graph, sizeof(struct Queue)), OK;
}
#endif
API cuGraphLaunch(void* executable, void* on) {
    ENTER_UNCAPTURED;
    if (!find(executable, EXECUTABLE) || !find(on, STREAM)) return wrong("cuGraphLaunch");
    struct Queue* queue = executable;
    for (int i = 0; i < queue->length; ++i) {
        push(on, queue->work[i]);
        if (queue->work[i].what == RUN) ++queue->work[i].kernel->launches;
    }
    return OK;
}
API cuGraphDestroy(void* graph) { return drop(graph, GRAPH); }
API cuGraphExecDestroy(void* executable) { return drop(executable, EXECUTABLE); }
