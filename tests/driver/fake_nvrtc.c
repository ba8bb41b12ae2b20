// A run-time compiler that makes "code" of anything but a source with the word `mistake`.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default"))) int

struct Program {
    char source[4096], log[256], code[256];
};

static int known[] = {75, 80, 86, 90, 100};

API nvrtcVersion(int* major, int* minor) {
    const char* wanted = getenv("FAKE_NVRTC");
    int version = wanted ? atoi(wanted) : 13000;
    return *major = version / 1000, *minor = version % 1000 / 10, 0;
}
API nvrtcGetNumSupportedArchs(int* count) { return *count = sizeof known / sizeof *known, 0; }
API nvrtcGetSupportedArchs(int* to) { return memcpy(to, known, sizeof known), 0; }
API nvrtcCreateProgram(struct Program** program, const char* source, const char* name, int headers,
                       const char* const* texts, const char* const* names) {
    int has_header = 0;
    for (int i = 0; i < headers; ++i) has_header |= !strcmp(names[i], "device.cuh") && *texts[i];
    if (!has_header) return 3;
    struct Program* made = *program = calloc(1, sizeof **program);
    snprintf(made->source, sizeof made->source, "%s", source);
    if (strstr(source, "mistake"))
        snprintf(made->log, sizeof made->log, "%s(1): warning: x\n%s(2): error: mistake\n1 error\n", name, name);
    return 0;
}
API nvrtcCompileProgram(struct Program* program, int count, const char* const* options) {
    const char* arch = NULL;
    int on_device = 0;  // without this option a real one refuses generic lambdas
    for (int i = 0; i < count; ++i) {
        if (!strncmp(options[i], "--gpu-architecture=", 19)) arch = options[i] + 19;
        on_device |= !strcmp(options[i], "--device-as-default-execution-space");
    }
    if (!arch || !on_device) return 5;
    snprintf(program->code, sizeof program->code, "code for %s", arch);
    return *program->log ? 6 : 0;
}
API nvrtcGetProgramLogSize(struct Program* program, size_t* size) { return *size = strlen(program->log) + 1, 0; }
API nvrtcGetProgramLog(struct Program* program, char* to) { return strcpy(to, program->log), 0; }
static int is_machine_code(struct Program* program) { return !!strstr(program->code, "sm_"); }
API nvrtcGetCUBINSize(struct Program* program, size_t* size) {
    return *size = strlen(program->code) + 1, !is_machine_code(program);
}
API nvrtcGetCUBIN(struct Program* program, char* to) { return strcpy(to, program->code), 0; }
API nvrtcGetPTXSize(struct Program* program, size_t* size) {
    return *size = strlen(program->code) + 1, is_machine_code(program);
}
API nvrtcGetPTX(struct Program* program, char* to) { return strcpy(to, program->code), 0; }
API nvrtcDestroyProgram(struct Program** program) { return free(*program), *program = NULL, 0; }
