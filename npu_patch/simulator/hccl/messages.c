/* Messages: what one rank sends to another, and what it does when the two do not fit. */
#include "hccl.h"
#include <errno.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct { Header header; uint64_t offset; } Message;
typedef struct Received { Message message; int file; struct Received *next; } Received;
typedef union { char room[CMSG_SPACE(sizeof(int))]; struct cmsghdr aligned; } Rights; /* the file goes along */

uint64_t simulator_hccl_counted[CALLS][2];

#define BREAK(comm, code, ...) do { (comm)->broken = 1; FAIL(code, __VA_ARGS__); } while (0)
#define CHECK(comm, peer, call) do { \
    if ((peer) >= (comm)->size) FAIL(BAD_PARAMETER, "%s: rank %u of %u", call_names[call], peer, (comm)->size); \
    if ((comm)->broken) \
        FAIL(REMOTE, "%s: an earlier call of communicator %s failed, it cannot be used any more", call_names[call], \
             (comm)->name); \
} while (0)

static long patience(void) { return seconds_of("HCCL_EXEC_TIMEOUT", 1836); }

/* ---- The data of a call, in one file whoever gets it. ---- */

int file_of(int *file) {
    *file = memfd_create("hccl", MFD_CLOEXEC);
    if (*file < 0) FAIL(SYSTEM_CALL, "HCCL: memfd_create: %s", strerror(errno));
    return SUCCESS;
}
int add_to(int file, const void *data, uint64_t bytes) {
    for (uint64_t done = 0; done < bytes; ) {
        ssize_t n = write(file, (const char *)data + done, bytes - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) FAIL(NO_MEMORY, "HCCL: no memory for a message of %llu bytes: %s", (unsigned long long)bytes,
                         strerror(errno));
        done += (uint64_t)n;
    }
    return SUCCESS;
}

/* ---- Receiving. ---- */

enum { GONE, NOTHING_YET, A_MESSAGE };
static int receive(int socket, Received *into) {
    Rights control = {0};
    struct iovec part = {&into->message, sizeof into->message};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n;
    do n = recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT); while (n < 0 && errno == EINTR);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return NOTHING_YET;
    struct cmsghdr *rights = n == sizeof into->message ? CMSG_FIRSTHDR(&header) : NULL;
    if (!rights) return GONE;
    memcpy(&into->file, CMSG_DATA(rights), sizeof into->file);
    return A_MESSAGE;
}

/* Keep what arrives meanwhile, so that two ranks which both have much to send do not wait for each other. */
static int receive_all(Comm *comm) {
    for (uint32_t peer = 0; peer < comm->size; peer++) {
        Received got, **last = &comm->waiting[peer];
        while (*last) last = &(*last)->next;
        while (receive(comm->socket[peer], &got) == A_MESSAGE) {
            if (!(*last = malloc(sizeof got))) { close(got.file); return NO_MEMORY; }
            got.next = NULL;
            **last = got;
            last = &(*last)->next;
        }
    }
    return SUCCESS;
}
void drop_waiting(Comm *comm) {
    for (uint32_t peer = 0; comm->waiting && peer < comm->size; peer++)
        for (Received *each = comm->waiting[peer], *next; each; each = next) {
            next = each->next;
            close(each->file);
            free(each);
        }
    free(comm->waiting);
}

/* Ranks agree upon the order of their collectives; messages from one to another are in order anyhow. */
static uint64_t number_of(const Comm *comm, const Header *header) { return header->call == SEND ? 0 : comm->collectives; }

/* The next message of `peer`; its file is the caller's to close. */
static int next_message(Comm *comm, uint32_t peer, Header *expected, Received *got) {
    const char *call = call_names[expected->call];
    Received *kept = comm->waiting[peer];
    double until = 0;
    CHECK(comm, peer, expected->call);
    expected->number = number_of(comm, expected);
    if (kept) {
        comm->waiting[peer] = kept->next;
        *got = *kept;
        free(kept);
    } else for (int found; (found = receive(comm->socket[peer], got)) != A_MESSAGE; ) {
        struct pollfd one = {comm->socket[peer], POLLIN, 0};
        if (found == GONE) BREAK(comm, REMOTE, "%s: rank %u of communicator %s is gone", call, peer, comm->name);
        if (!until) until = now() + (double)patience();
        if (now() > until)
            BREAK(comm, TIMED_OUT, "%s: rank %u waited for rank %u of communicator %s, which did not call it within "
                  "HCCL_EXEC_TIMEOUT (%ld s)", call, comm->rank, peer, comm->name, patience());
        poll(&one, 1, (int)((until - now()) * 1e3) + 1);
    }
    if (memcmp(&got->message.header, expected, sizeof *expected)) {
        char here[160], there[160];
        Header mine = *expected;
        if (mine.call == SEND) mine.call = RECEIVE; /* that is what it did */
        close(got->file);
        describe(here, sizeof here, &mine);
        describe(there, sizeof there, &got->message.header);
        BREAK(comm, BAD_PARAMETER, "the ranks of communicator %s disagree: rank %u called %s, rank %u called %s",
              comm->name, comm->rank, here, peer, there);
    }
    return SUCCESS;
}

static int read_from(Comm *comm, int file, uint64_t offset, void *into, uint64_t bytes) {
    for (uint64_t done = 0; done < bytes; ) {
        ssize_t n = pread(file, (char *)into + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) BREAK(comm, INTERNAL, "HCCL communicator %s: a message cannot be read: %s", comm->name, strerror(errno));
        done += (uint64_t)n;
    }
    return SUCCESS;
}

/* Receive what `expected` says into `into`. */
int take(Comm *comm, uint32_t peer, Header expected, void *into) {
    Received got;
    TRY(next_message(comm, peer, &expected, &got));
    int code = read_from(comm, got.file, got.message.offset, into, expected.count * bytes_of[expected.dtype]);
    close(got.file);
    return code;
}

/* Receive it and reduce what is in `into` with it, piece by piece: fresh memory costs more than the sum. */
int take_and_reduce(Comm *comm, uint32_t peer, Header expected, void *into) {
    static __thread char piece[1 << 16];
    Received got;
    TRY(next_message(comm, peer, &expected, &got));
    uint64_t size = bytes_of[expected.dtype], most = sizeof piece / size, done = 0;
    int code = SUCCESS;
    while (!code && done < expected.count) {
        uint64_t count = expected.count - done < most ? expected.count - done : most;
        code = read_from(comm, got.file, got.message.offset + done * size, piece, count * size);
        if (!code) combine((char *)into + done * size, piece, count, expected.dtype, expected.op);
        done += count;
    }
    close(got.file);
    return code;
}

/* ---- Sending. ---- */

/* Say to `peer` that `file` has what `header` describes, from `offset`. */
int put(Comm *comm, uint32_t peer, Header header, int file, uint64_t offset) {
    CHECK(comm, peer, header.call);
    header.number = number_of(comm, &header);
    Message message = {header, offset};
    Rights control = {0};
    struct iovec part = {&message, sizeof message};
    struct msghdr whole = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&whole);
    *rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof file), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(rights), &file, sizeof file);
    int to = peer == comm->rank ? comm->to_self : comm->socket[peer];
    double until = 0;
    while (sendmsg(to, &whole, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != ETOOMANYREFS && errno != ENOBUFS) /* full, for now */
            BREAK(comm, REMOTE, "%s: rank %u of communicator %s is gone (%s)", call_names[header.call], peer, comm->name,
                  strerror(errno));
        if (!until) until = now() + (double)patience();
        if (now() > until)
            BREAK(comm, TIMED_OUT, "%s: rank %u of communicator %s takes no more messages of rank %u: it did not receive "
                  "within HCCL_EXEC_TIMEOUT (%ld s)", call_names[header.call], peer, comm->name, comm->rank, patience());
        TRY(receive_all(comm));
        usleep(1000);
    }
    if (peer != comm->rank) {
        uint64_t bytes = header.count * bytes_of[header.dtype];
        if (header.call == ALL_REDUCE) bytes = bytes * 2 / comm->size; /* a reduce-scatter and an all-gather, on any NPU */
        __sync_fetch_and_add(&simulator_hccl_counted[header.call][1], bytes);
    }
    return SUCCESS;
}
