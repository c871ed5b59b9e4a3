/*
 * Streams, events and graphs of the CANN stub. Work is done when it is issued, so everything is always complete, except
 * behind a wait of a graph that nobody has ended.
 *
 * While a stream is captured, what is issued on it is recorded instead: the kernels by Python (graphs.py), which also
 * runs them at a replay. Here is what CANN is asked about: which streams belong to which capture, how events carry a
 * capture from one stream to another and back, and what a capture does not allow.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* rt_error_codes.h */
#define ERROR_INVALID_PARAMETER 107000
#define ERROR_CAPTURE_DEPENDENCY 107024
#define ERROR_STREAM_UNJOINED 107025
#define ERROR_STREAM_CAPTURED 107027
#define ERROR_EVENT_CAPTURED 107028
#define ERROR_STREAM_NOT_CAPTURED 107029
#define ERROR_CAPTURE_IMPLICIT 107031
#define ERROR_CAPTURE_CONFLICT 107032
#define ERROR_OUT_OF_MEMORY 207001
#define ERROR_SYNC_TIMEOUT 507046
#define ERROR_CAPTURE_INVALIDATED 507903

void simulator_set_error(const char *message); /* cann_stub.c */
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind);
int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes);

/* ---- What graphs.py does; its numbers are the same there. ---- */

enum { BEGIN, END, EXECUTE, DESTROY, GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, EVENT_WAIT, EVENT_RESET,
       EVENT_RECORD, COPY, SET, PREFETCH };
typedef int64_t (*GraphCallback)(int what, int64_t graph, int64_t first, int64_t second, int64_t third);
static GraphCallback on_graph;
void simulator_on_graph(GraphCallback callback) { on_graph = callback; }
static int ask(int what, int64_t graph, int64_t first, int64_t second, int64_t third) {
    return on_graph ? (int)on_graph(what, graph, first, second, third) : 0;
}

/* ---- Streams. ---- */

typedef struct Capture {
    int64_t graph;
    struct Stream *origin, *streams;
    int broken;
    char why[400];
    struct Capture *next;
} Capture;
typedef struct Stream {
    int32_t id;
    Capture *capture;
    struct Stream *next;     /* in the capture */
    uint64_t tasks, joined;  /* issued in the capture; how many of them the others wait for */
    int waits;               /* for an external event, in a replay */
} Stream;

static int32_t streams_made;
static Capture *captures;
static int64_t graphs_made;
static int streams_waiting;

static int new_stream(void **stream) {
    Stream *made = calloc(1, sizeof *made);
    if (!made) return ERROR_OUT_OF_MEMORY;
    made->id = __sync_fetch_and_add(&streams_made, 1);
    *stream = made;
    return 0;
}
int aclrtCreateStream(void **stream) { return new_stream(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return new_stream(stream); }
int aclrtDestroyStream(void *stream) { free(stream); return 0; }
int aclrtDestroyStreamForce(void *stream) { free(stream); return 0; }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = stream ? ((Stream *)stream)->id : 0; return 0; }
int aclrtSetStreamAttribute(void *stream, int attribute, void *value) { return 0; }

static Capture *capture_of(void *stream) { return stream ? ((Stream *)stream)->capture : NULL; }

static void invalidate(Capture *capture, const char *why) {
    if (capture && !capture->broken) {
        capture->broken = 1;
        snprintf(capture->why, sizeof capture->why, "%s", why);
    }
}
/* Ends what was captured so far, and says why. */
static int forbid(Capture *capture, int error, const char *what) {
    char message[400];
    snprintf(message, sizeof message, "%s is not permitted while a graph is being captured", what);
    invalidate(capture, message);
    simulator_set_error(message);
    return error;
}
static int never_ends(void) {
    simulator_set_error("a replay waits for an external event that nobody recorded: the device would never finish. Call "
                        "NPUGraph.update() once for each replay, before it or right after it");
    return ERROR_SYNC_TIMEOUT;
}

/* For graphs.py. The graph that captures a kernel launched on the stream; 0: it runs, -1: it would never, -2: the
 * capture is invalid. */
int64_t simulator_launch(Stream *stream) {
    if (!stream) return 0;
    if (stream->waits) return never_ends(), -1;
    if (!stream->capture) return 0;
    stream->tasks++;
    return stream->capture->broken ? (simulator_set_error(stream->capture->why), -2) : stream->capture->graph;
}
void simulator_invalidate(int64_t graph, const char *why) {
    for (Capture *capture = captures; capture; capture = capture->next)
        if (capture->graph == graph) invalidate(capture, why);
}
void simulator_wait(Stream *stream, int yes) {
    if (!stream) return;
    streams_waiting += yes - stream->waits;
    stream->waits = yes;
}

/* For libhccl.so, which records nothing: the capture ends. */
int simulator_is_captured(Stream *stream) {
    invalidate(capture_of(stream), "communication within a captured graph is not simulated");
    return capture_of(stream) != NULL;
}

static int synchronize_stream(Stream *stream) {
    if (capture_of(stream)) return forbid(stream->capture, ERROR_STREAM_CAPTURED, "waiting for the captured stream");
    return stream && stream->waits ? never_ends() : 0;
}
static int synchronize_device(void) {
    if (captures) return forbid(captures, ERROR_STREAM_CAPTURED, "waiting for the device");
    return streams_waiting ? never_ends() : 0;
}
int aclrtSynchronizeStream(void *stream) { return synchronize_stream(stream); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds) { return synchronize_stream(stream); }
int aclrtSynchronizeDevice(void) { return synchronize_device(); }
int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) { return synchronize_device(); }
int aclrtStreamQuery(void *stream, int32_t *status) {
    if (capture_of(stream)) return forbid(capture_of(stream), ERROR_STREAM_CAPTURED, "asking whether the stream is done");
    *status = stream && ((Stream *)stream)->waits; /* 0: complete */
    return 0;
}

/* ---- Copies in the order of a stream. ---- */

#define DEVICE_TO_DEVICE 3
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    Capture *capture = capture_of(stream);
    if (!capture) return aclrtMemcpy(to, room, from, bytes, kind);
    if (kind != DEVICE_TO_DEVICE) return forbid(capture, ERROR_STREAM_CAPTURED, "a copy between host and device");
    if (bytes > room) return ERROR_INVALID_PARAMETER;
    ((Stream *)stream)->tasks++;
    return ask(COPY, capture->graph, (int64_t)to, (int64_t)from, (int64_t)bytes);
}
int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpyAsync(to, room, from, bytes, kind, stream);
}
int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) {
    Capture *capture = capture_of(stream);
    if (!capture) return aclrtMemset(to, room, value, bytes);
    if (bytes > room) return ERROR_INVALID_PARAMETER;
    ((Stream *)stream)->tasks++;
    return ask(SET, capture->graph, (int64_t)to, value, (int64_t)bytes);
}

/* A prefetch into the L2 cache changes nothing: graphs.py has who counts told of it. */
#define CMO_PREFETCH 0
int aclrtCmoAsync(void *from, size_t bytes, int what, void *stream) {
    Capture *capture = capture_of(stream);
    if (what != CMO_PREFETCH) return ERROR_INVALID_PARAMETER;
    if (capture) ((Stream *)stream)->tasks++;
    else if (stream && ((Stream *)stream)->waits) return never_ends();
    return ask(PREFETCH, capture ? capture->graph : 0, (int64_t)from, (int64_t)bytes, ((Stream *)stream)->id);
}

/* ---- Events. One that is recorded in a capture belongs to it. ---- */

#define EXTERNAL 0x20 /* ACL_EVENT_EXTERNAL: part of no capture; a wait for it is a node of the graph */
typedef struct {
    struct timespec recorded;
    uint32_t flag;
    int64_t graph; /* 0: recorded in no capture */
    Stream *stream;
    uint64_t tasks; /* of the stream, when it was recorded */
} Event;

static int new_event(void **event, uint32_t flag) {
    Event *made = calloc(1, sizeof *made);
    if (!made) return ERROR_OUT_OF_MEMORY;
    made->flag = flag;
    *event = made;
    return 0;
}
int aclrtCreateEvent(void **event) { return new_event(event, 0); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_event(event, flag); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return new_event(event, flag); }
int aclrtDestroyEvent(void *event) { free(event); return 0; }

static int external(int what, int64_t event, Stream *stream) {
    Capture *capture = capture_of(stream);
    if (capture) stream->tasks++;
    return ask(what, capture ? capture->graph : 0, event, 0, 0);
}
int aclrtRecordEvent(void *given, void *on) {
    Event *event = given;
    Stream *stream = on;
    Capture *capture = capture_of(stream);
    clock_gettime(CLOCK_MONOTONIC, &event->recorded);
    if (event->flag & EXTERNAL) return external(EVENT_RECORD, (int64_t)event, stream);
    event->graph = capture ? capture->graph : 0;
    event->stream = stream;
    event->tasks = stream ? stream->tasks : 0;
    return 0;
}
int aclrtStreamWaitEvent(void *on, void *given) {
    Event *event = given;
    Stream *stream = on;
    Capture *mine = capture_of(stream), *its = captures;
    if (event->flag & EXTERNAL) return mine ? external(EVENT_WAIT, (int64_t)event, stream) : 0;
    while (its && its->graph != event->graph) its = its->next;
    if (!its)
        return mine ? forbid(mine, ERROR_CAPTURE_DEPENDENCY, "waiting for an event that was not recorded in the capture") : 0;
    if (mine && mine != its) return forbid(mine, ERROR_CAPTURE_CONFLICT, "waiting for an event of another capture");
    if (!mine) { /* a fork */
        stream->capture = its;
        stream->next = its->streams;
        stream->joined = stream->tasks = 0;
        its->streams = stream;
    }
    stream->tasks++;
    if (event->stream->joined < event->tasks) event->stream->joined = event->tasks;
    return 0;
}
int aclrtResetEvent(void *event, void *stream) {
    return ((Event *)event)->flag & EXTERNAL ? external(EVENT_RESET, (int64_t)event, stream) : 0;
}
static int on_host(const Event *event, const char *what) {
    if (!event->graph) return 0;
    for (Capture *capture = captures; capture; capture = capture->next)
        if (capture->graph == event->graph) return forbid(capture, ERROR_EVENT_CAPTURED, what);
    simulator_set_error("the event was recorded in a capture: the host can neither ask for it nor wait for it");
    return ERROR_EVENT_CAPTURED;
}
int aclrtSynchronizeEvent(void *event) {
    int error = on_host(event, "waiting for an event of the capture");
    return error ? error : streams_waiting ? never_ends() : 0;
}
int aclrtQueryEventStatus(void *event, int32_t *status) {
    *status = !streams_waiting; /* 1: complete */
    return on_host(event, "asking for an event of the capture");
}
int aclrtQueryEventWaitStatus(void *event, int32_t *status) { *status = 1; return 0; }
int aclrtEventElapsedTime(float *milliseconds, void *start, void *end) {
    struct timespec a = ((Event *)start)->recorded, b = ((Event *)end)->recorded;
    *milliseconds = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6);
    return 0;
}
int aclrtEventGetTimestamp(void *event, uint64_t *microseconds) {
    struct timespec at = ((Event *)event)->recorded;
    *microseconds = (uint64_t)at.tv_sec * 1000000u + (uint64_t)at.tv_nsec / 1000u;
    return 0;
}
/* torch_npu 2.13 makes external events of these two: wait is a wait for 1, reset writes 0 and record writes 1. */
int aclrtValueWait(void *address, uint64_t value, uint32_t flag, void *stream) {
    return capture_of(stream) ? external(EVENT_WAIT, (int64_t)address, stream) : 0;
}
int aclrtValueWrite(void *address, uint64_t value, uint32_t flag, void *stream) {
    return external(value ? EVENT_RECORD : EVENT_RESET, (int64_t)address, stream);
}

/* ---- Graphs. ---- */

int aclmdlRICaptureBegin(void *on, int mode) {
    Stream *stream = on;
    if (!stream) return ERROR_CAPTURE_IMPLICIT;
    if (stream->capture) return forbid(stream->capture, ERROR_STREAM_CAPTURED, "a second capture of the stream");
    if (stream->waits) return never_ends();
    Capture *capture = calloc(1, sizeof *capture);
    if (!capture) return ERROR_OUT_OF_MEMORY;
    *capture = (Capture){.graph = ++graphs_made, .origin = stream, .streams = stream,
                          .next = captures};
    captures = stream->capture = capture;
    stream->next = NULL;
    stream->tasks = stream->joined = 0;
    return ask(BEGIN, capture->graph, 0, 0, 0);
}
int aclmdlRICaptureGetInfo(void *stream, int *status, void **graph) {
    Capture *capture = capture_of(stream);
    *status = !capture ? 0 : capture->broken ? 2 : 1; /* none, invalidated, active */
    if (graph) *graph = capture ? (void *)capture->graph : NULL;
    return 0;
}
int aclmdlRICaptureEnd(void *on, void **graph) {
    Capture *capture = capture_of(on);
    if (!capture || capture->origin != on) return ERROR_STREAM_NOT_CAPTURED;
    int error = 0;
    for (Stream *stream = capture->streams; stream; stream = stream->next) {
        if (stream != capture->origin && stream->joined < stream->tasks && !capture->broken) {
            char message[200];
            snprintf(message, sizeof message, "the stream %d was forked into the capture and not joined: record an event "
                     "on it as its last task, and wait for that on the captured stream", stream->id);
            invalidate(capture, message);
            error = ERROR_STREAM_UNJOINED;
        }
        stream->capture = NULL;
    }
    Capture **at = &captures;
    while (*at != capture) at = &(*at)->next;
    *at = capture->next;
    *graph = capture->broken ? NULL : (void *)capture->graph;
    int ended = ask(END, capture->graph, capture->broken, 0, 0);
    if (capture->broken) {
        char message[480];
        snprintf(message, sizeof message, "the capture is invalid: %s", capture->why);
        simulator_set_error(message);
        error = error ? error : ERROR_CAPTURE_INVALIDATED;
    }
    free(capture);
    return error ? error : ended;
}
int aclmdlRICaptureThreadExchangeMode(int *mode) { return 0; } /* every mode allows the same here */
int aclmdlRIExecuteAsync(void *graph, void *on) {
    Stream *stream = on;
    if (capture_of(stream)) return forbid(stream->capture, ERROR_STREAM_CAPTURED, "replaying a graph");
    if (stream && stream->waits) return never_ends();
    return ask(EXECUTE, (int64_t)graph, (int64_t)stream, 0, 0);
}
int aclmdlRIDestroy(void *graph) { return ask(DESTROY, (int64_t)graph, 0, 0, 0); }
int aclmdlRICaptureTaskGrpBegin(void *stream) {
    Capture *capture = capture_of(stream);
    return capture ? ask(GROUP_BEGIN, capture->graph, (int64_t)stream, 0, 0) : ERROR_STREAM_NOT_CAPTURED;
}
int aclmdlRICaptureTaskGrpEnd(void *stream, void **group) {
    Capture *capture = capture_of(stream);
    if (!capture || !on_graph) return ERROR_STREAM_NOT_CAPTURED;
    *group = (void *)on_graph(GROUP_END, capture->graph, (int64_t)stream, 0, 0); /* their number, from 1 */
    return 0;
}
int aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) {
    return ask(UPDATE_BEGIN, 0, (int64_t)stream, (int64_t)group, 0);
}
int aclmdlRICaptureTaskUpdateEnd(void *stream) { return ask(UPDATE_END, 0, (int64_t)stream, 0, 0); }
int aclmdlRIDebugJsonPrint(void *graph, const char *path, uint32_t flags) {
    simulator_set_error("npu_patch.simulator does not emulate the dump of a graph");
    return 207000;
}
