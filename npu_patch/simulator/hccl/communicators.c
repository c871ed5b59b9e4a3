/* Communicators: how the ranks of one machine find each other, and how they part. */
#include "hccl.h"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

int aclrtGetDevice(int32_t *device); /* cann_stub.c */

#define ROOT_INFO_BYTES 4108
#define ID_BYTES 33
typedef struct { uint32_t rank, size; int32_t device; } Hello;

double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
long seconds_of(const char *variable, long otherwise) {
    const char *value = getenv(variable);
    return value && atol(value) > 0 ? atol(value) : otherwise;
}

/* The machine and its network, within which sockets have their names. */
static void here(char *into, size_t room) {
    char boot[40] = "", network[40] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file && fscanf(file, "%39s", boot) != 1) boot[0] = 0;
    if (file) fclose(file);
    if (readlink("/proc/self/ns/net", network, sizeof network - 1) < 0) network[0] = 0;
    snprintf(into, room, "%s %s", boot, network);
}

int HcclGetRootInfo(char *root_info) {
    uint64_t random[2];
    if (getrandom(random, sizeof random, 0) != sizeof random) return SYSTEM_CALL;
    memset(root_info, 0, ROOT_INFO_BYTES);
    snprintf(root_info, ID_BYTES, "%016llx%016llx", (unsigned long long)random[0], (unsigned long long)random[1]);
    here(root_info + ID_BYTES, 100);
    return SUCCESS;
}

static socklen_t address(struct sockaddr_un *at, const char *id, uint32_t rank) {
    memset(at, 0, sizeof *at);
    at->sun_family = AF_UNIX; /* a leading zero byte: a name without a file, gone with its socket */
    int length = snprintf(at->sun_path + 1, sizeof at->sun_path - 1, "npu_patch-hccl-%s-%u", id, rank);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int readable(int socket, double until) {
    struct pollfd one = {socket, POLLIN, 0};
    for (;;) {
        double left = until - now();
        int ready = poll(&one, 1, left > 0 ? (int)(left * 1e3) + 1 : 0);
        if (ready > 0) return 1;
        if (!ready || errno != EINTR) return 0;
    }
}

/* Each side says who it is. */
static int greet(Comm *comm, int socket, double until, Hello *peer) {
    Hello mine = {comm->rank, comm->size, comm->device};
    if (send(socket, &mine, sizeof mine, MSG_NOSIGNAL) != sizeof mine || !readable(socket, until) ||
        recv(socket, peer, sizeof *peer, 0) != sizeof *peer || peer->rank >= comm->size) {
        close(socket);
        FAIL(REMOTE, "HCCL rank %u: another rank went away while %s was created", comm->rank, comm->name);
    }
    comm->socket[peer->rank] = socket;
    if (peer->size != comm->size)
        FAIL(BAD_PARAMETER, "the ranks of communicator %s disagree: rank %u says that there are %u, rank %u says %u",
             comm->name, comm->rank, comm->size, peer->rank, peer->size);
    if (peer->device == comm->device)
        FAIL(BAD_PARAMETER, "ranks %u and %u of communicator %s both use device %d: each needs one of its own, by "
             "torch.npu.set_device(LOCAL_RANK)", comm->rank, peer->rank, comm->name, comm->device);
    return SUCCESS;
}

static int connect_to(Comm *comm, const char *id, uint32_t peer, double until, long timeout) {
    struct sockaddr_un at;
    socklen_t length = address(&at, id, peer);
    Hello its;
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0) FAIL(SYSTEM_CALL, "HCCL rank %u: %s", comm->rank, strerror(errno));
    while (connect(fd, (struct sockaddr *)&at, length)) { /* it may not listen yet */
        if ((errno != ECONNREFUSED && errno != EINTR && errno != EAGAIN) || now() > until) {
            close(fd);
            FAIL(TIMED_OUT, "HCCL rank %u waited %ld s for rank %u of %u to create communicator %s", comm->rank, timeout,
                 peer, comm->size, comm->name);
        }
        usleep(2000);
    }
    return greet(comm, fd, until, &its);
}

static int connect_all(Comm *comm, const char *id, int listening) {
    long timeout = seconds_of("HCCL_CONNECT_TIMEOUT", 120);
    double until = now() + (double)timeout;
    struct sockaddr_un at;
    socklen_t length = address(&at, id, comm->rank);
    if (bind(listening, (struct sockaddr *)&at, length) || listen(listening, 128))
        FAIL(SYSTEM_CALL, "HCCL rank %u of communicator %s: %s", comm->rank, comm->name, strerror(errno));
    for (uint32_t peer = 0; peer < comm->rank; peer++) TRY(connect_to(comm, id, peer, until, timeout));
    for (uint32_t left = comm->size - 1 - comm->rank; left; left--) { /* the higher ranks connect to this one */
        Hello its;
        int fd = readable(listening, until) ? accept4(listening, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (fd < 0)
            FAIL(TIMED_OUT, "HCCL rank %u waited %ld s for %u of %u ranks to create communicator %s", comm->rank, timeout,
                 left, comm->size, comm->name);
        TRY(greet(comm, fd, until, &its));
    }
    return SUCCESS;
}

/* ---- A forked child is no rank: it lets go of the sockets, so that its parent's death is noticed. ---- */

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static Comm *all;
static void close_sockets(Comm *comm) {
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        if (comm->socket[peer] >= 0) close(comm->socket[peer]);
        comm->socket[peer] = -1;
    }
    if (comm->to_self >= 0) close(comm->to_self);
    comm->to_self = -1;
}
static void lock(void) { pthread_mutex_lock(&list_lock); }
static void unlock(void) { pthread_mutex_unlock(&list_lock); }
static void in_child(void) {
    for (Comm *comm = all; comm; comm = comm->next) close_sockets(comm);
    unlock();
}
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(lock, unlock, in_child); }

void drop_waiting(Comm *comm); /* messages.c */

int HcclCommDestroy(Comm *comm) {
    if (!comm) return BAD_POINTER;
    lock();
    if (comm->previous) comm->previous->next = comm->next;
    if (comm->next) comm->next->previous = comm->previous;
    if (all == comm) all = comm->next;
    unlock();
    close_sockets(comm);
    drop_waiting(comm);
    free(comm);
    return SUCCESS;
}

static int create(uint32_t size, const char *root_info, uint32_t rank, const char *name, Comm **made) {
    char mine[100];
    int pair[2], listening, code;
    if (rank >= size) FAIL(BAD_PARAMETER, "HCCL: rank %u of %u", rank, size);
    here(mine, sizeof mine);
    if (strcmp(mine, root_info + ID_BYTES))
        FAIL(UNSUPPORTED, "HCCL rank %u of %u: only ranks of one machine and network namespace are simulated", rank, size);
    Comm *comm = malloc(sizeof *comm + size * sizeof(int));
    if (!comm) return NO_MEMORY;
    *comm = (Comm){.size = size, .rank = rank, .to_self = -1};
    snprintf(comm->name, sizeof comm->name, "%s", name && *name ? name : root_info);
    for (uint32_t peer = 0; peer < size; peer++) comm->socket[peer] = -1;
    comm->waiting = calloc(size, sizeof *comm->waiting);
    lock();
    comm->next = all;
    if (all) all->previous = comm;
    all = comm;
    unlock();
    if (!comm->waiting || aclrtGetDevice(&comm->device) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) {
        HcclCommDestroy(comm);
        FAIL(SYSTEM_CALL, "HCCL rank %u of %u: no device was set, or %s", rank, size, strerror(errno));
    }
    comm->to_self = pair[0];
    comm->socket[rank] = pair[1];
    listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    code = connect_all(comm, root_info, listening);
    close(listening);
    if (code) { HcclCommDestroy(comm); return code; }
    *made = comm;
    return SUCCESS;
}
int HcclCommInitRootInfo(uint32_t size, const char *root_info, uint32_t rank, Comm **made) {
    return create(size, root_info, rank, NULL, made);
}
/* HcclCommConfig: 24 bytes reserved, the sizes of the buffer and of determinism, the name */
int HcclCommInitRootInfoConfig(uint32_t size, const char *root_info, uint32_t rank, const char *config, Comm **made) {
    return create(size, root_info, rank, config + 32, made);
}
/* one process with several devices (torch.nn.DataParallel) */
int HcclCommInitAll(uint32_t size, int32_t *devices, Comm **made) {
    (void)size, (void)devices, (void)made;
    FAIL(UNSUPPORTED, "HcclCommInitAll: several devices in one process are not simulated");
}
uint32_t HcclGetCommConfigCapability(void) { return 3; } /* buffer size, determinism, name */
int HcclGetCommName(Comm *comm, char *name) { strcpy(name, comm->name); return SUCCESS; }
int HcclGetCommAsyncError(Comm *comm, int *error) { (void)comm; *error = SUCCESS; return SUCCESS; } /* the call raised */
int HcclGetRankSize(Comm *comm, uint32_t *size) { *size = comm->size; return SUCCESS; }
int HcclGetRankId(Comm *comm, uint32_t *rank) { *rank = comm->rank; return SUCCESS; }
int HcclSetConfig(int name, int value) { (void)name, (void)value; return SUCCESS; } /* determinism: always given */
