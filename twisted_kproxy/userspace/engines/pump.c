/*
 * The engine of raw pairs (pairs.py) in C: the same states, the same decisions. Edge-triggered; that a socket takes bytes
 * is waited for once it has not taken some. One pump is used by one thread at a time but for the calls that say otherwise.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 65536
#define READS 8
#define FULL 2
#define CHUNK (1 << 20)
#define PIPED (4 << 20)
#define LEAST (1 << 17)
#define BATCH 256
#define SWEEP 15.0
#define QUIET (EPOLLIN | EPOLLRDHUP | EPOLLET)
#define INPUT (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)
#define LAST (EPOLLRDHUP | EPOLLHUP | EPOLLERR)

enum { DONE, CLIENT_RESET, BACKEND_RESET, CLIENT_TIMEOUT, BACKEND_TIMEOUT, ABORTED };

struct pair;

struct half {
    struct pair *pair;
    int fd;
    int error;                   /* with which this side stopped taking bytes */
    int pipe[2];                 /* what is read here goes through this one; -1 for none */
    size_t held;                 /* bytes in it */
    char *pending;               /* what the kernel did not take of what is meant for this side */
    size_t from, to;             /* of pending, what is still to be sent */
    uint64_t count;              /* bytes read here and handed to the kernel on the other side */
    unsigned char last;          /* no event will tell of what is left to read: read on until the end */
    unsigned char ended;         /* nothing more will be read here */
    unsigned char shut;          /* this side was told that nothing more comes */
    unsigned char full;          /* it has not taken all at some time; since then it is told when it takes bytes again */
    unsigned char backend;
};

struct pair {
    struct half half[2];         /* client, backend */
    struct pair *next, *previous;/* all that are open; of those that are closed, the next to be freed */
    struct pair *again;          /* the next that has more to do than it was allowed to at once */
    uint64_t id;
    uint64_t moved;              /* bytes that had moved at lastMoved */
    double lastMoved;            /* since one direction has ended, or a side has failed; negative before */
    unsigned char open, failing, lasting, queued;
};

struct ended {
    uint64_t id;
    uint64_t sent, received;
    int reason;
};

typedef struct pump {
    int epoll, wake, stopping;
    pthread_mutex_t lock;
    char *buffer;
    struct pair all;             /* a ring; this one is no pair */
    struct pair **slots;         /* by id: those that are open */
    size_t slotRoom;
    struct pair *doomed;
    struct pair *again;
    struct ended *endings;
    size_t endingCount, endingRoom;
    int (*idle)[2];              /* pipes that wait for somebody */
    int idleCount, pipes, mostPipes, splicing;
    uint64_t open;
    double halfClosed;
} pump;

static double now(void)
{
    struct timespec it;
    clock_gettime(CLOCK_MONOTONIC, &it);
    return it.tv_sec + it.tv_nsec / 1e9;
}

static struct half *peerOf(struct half *half)
{
    return &half->pair->half[!half->backend];
}

/* --- pipes */

static int takePipe(pump *p, int ends[2])
{
    if (p->idleCount) {
        p->idleCount--;
        ends[0] = p->idle[p->idleCount][0];
        ends[1] = p->idle[p->idleCount][1];
        return 1;
    }
    if (p->pipes >= p->mostPipes || pipe2(ends, O_NONBLOCK | O_CLOEXEC) < 0)
        return 0;
    if (fcntl(ends[1], F_SETPIPE_SZ, CHUNK) < LEAST) {
        close(ends[0]);
        close(ends[1]);
        ends[0] = ends[1] = -1;
        p->mostPipes = p->pipes;
        return 0;
    }
    p->pipes++;
    return 1;
}

static void leavePipe(pump *p, struct half *half)
{
    if (half->pipe[0] < 0)
        return;
    if (half->held) {            /* what is in it must not go to somebody else */
        close(half->pipe[0]);
        close(half->pipe[1]);
        p->pipes--;
    } else {
        p->idle[p->idleCount][0] = half->pipe[0];
        p->idle[p->idleCount][1] = half->pipe[1];
        p->idleCount++;
    }
    half->pipe[0] = half->pipe[1] = -1;
    half->held = 0;
}

/* --- ends */

static void tell(pump *p, struct pair *pair, int reason)
{
    if (p->endingCount == p->endingRoom) {
        size_t room = p->endingRoom ? 2 * p->endingRoom : 256;
        struct ended *more = realloc(p->endings, room * sizeof *more);
        if (!more)
            return;              /* no memory for 32 bytes: the process is lost anyway */
        p->endings = more;
        p->endingRoom = room;
    }
    struct ended *it = &p->endings[p->endingCount++];
    it->id = pair->id;
    it->sent = pair->half[0].count;
    it->received = pair->half[1].count;
    it->reason = reason;
    if (p->endingCount == 1 && p->wake >= 0) {
        uint64_t one = 1;
        if (write(p->wake, &one, sizeof one) < 0) { /* it is awake already */ }
    }
}

static void closePair(pump *p, struct pair *pair, int reason)
{
    if (!pair->open)
        return;
    pair->open = 0;
    for (int i = 0; i < 2; i++) {
        struct half *half = &pair->half[i];
        leavePipe(p, half);
        free(half->pending);
        half->pending = NULL;
        if (reason != DONE) {
            struct linger reset = {1, 0};
            setsockopt(half->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        }
        close(half->fd);
    }
    pair->previous->next = pair->next;
    pair->next->previous = pair->previous;
    p->open--;
    p->slots[pair->id] = NULL;
    tell(p, pair, reason);
    /* Events of this batch may still point to it. */
    pair->next = p->doomed;
    p->doomed = pair;
}

static void broken(pump *p, struct half *half, int number)
{
    int vanished = number == ETIMEDOUT || number == EHOSTUNREACH || number == ENETUNREACH || number == EHOSTDOWN
        || number == ENETDOWN;
    closePair(p, half->pair, (vanished ? CLIENT_TIMEOUT : CLIENT_RESET) + half->backend);
}

static void oneSided(struct pair *pair)
{
    if (pair->lastMoved < 0)
        pair->lastMoved = now();
}

static void goOnLater(pump *p, struct pair *pair)
{
    if (!pair->queued) {
        pair->queued = 1;
        pair->again = p->again;
        p->again = pair;
    }
}

/* That side takes nothing any more; what it had said before waits in the kernel and is still passed on. */
static void deaf(pump *p, struct half *half, int number)
{
    if (!half->pair->open || half->error)
        return;
    half->error = number ? number : EPIPE;
    free(half->pending);
    half->pending = NULL;
    half->last = 1;
    leavePipe(p, peerOf(half));
    oneSided(half->pair);
    if (peerOf(half)->error)     /* nobody is left to listen to either of them */
        broken(p, peerOf(half), peerOf(half)->error);
    else if (half->ended)
        broken(p, half, number);
    else
        goOnLater(p, half->pair);
}

static void shutHalf(pump *p, struct half *half)
{
    half->shut = 1;
    if (shutdown(half->fd, SHUT_WR) < 0) {
        deaf(p, half, errno);
        return;
    }
    if (peerOf(half)->shut)
        closePair(p, half->pair, DONE);
}

static void readEnded(pump *p, struct half *half)
{
    half->ended = 1;
    oneSided(half->pair);
    if (half->error) {
        broken(p, half, half->error);
        return;
    }
    if (peerOf(half)->pending)
        return;
    if (half->shut)
        closePair(p, half->pair, DONE);
    else
        shutHalf(p, peerOf(half));
}

/* --- bytes */

static int watch(pump *p, struct half *half, int operation)
{
    struct epoll_event event = {.events = QUIET | (half->full ? EPOLLOUT : 0), .data = {.ptr = half}};
    return epoll_ctl(p->epoll, operation, half->fd, &event);
}

/* This side takes no more now; it is to be told when it does. */
static void isFull(pump *p, struct half *half)
{
    if (!half->full) {
        half->full = 1;
        watch(p, half, EPOLL_CTL_MOD);
    }
}

static int drain(pump *p, struct half *half)
{
    struct half *peer = peerOf(half);
    while (half->held) {
        ssize_t sent = splice(half->pipe[0], NULL, peer->fd, NULL, half->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno == EAGAIN)
                isFull(p, peer);
            else
                deaf(p, peer, errno);
            return 0;
        }
        half->held -= sent;
        half->count += sent;
    }
    return 1;
}

static void pumpPipe(pump *p, struct half *half)
{
    size_t total = 0;
    while (total < PIPED) {
        if (half->held && !drain(p, half))
            return;
        ssize_t size = splice(half->fd, NULL, half->pipe[1], NULL, CHUNK, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (size < 0) {
            int number = errno;
            if (number == EINTR)
                continue;
            leavePipe(p, half);
            if (number == EAGAIN) {
                half->last = 0;
            } else if (number == EINVAL) {
                p->splicing = 0;
                goOnLater(p, half->pair);
            } else {
                broken(p, half, number);
            }
            return;
        }
        if (!size) {
            leavePipe(p, half);
            readEnded(p, half);
            return;
        }
        half->held = size;
        total += size;
    }
    goOnLater(p, half->pair);
}

/* What waits for more goes out now. */
static void noDelay(struct half *half)
{
    int on = 1;
    setsockopt(half->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* See quickAck() in sockets.py. */
static void quickAck(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
}

/* With MSG_MORE the last of it is there, and the end: the two go out as one packet. */
static void pumpHalf(pump *p, struct half *half, int more)
{
    struct half *peer = peerOf(half);
    int full = 0, held = 0;
    if (half->ended || peer->pending || peer->error)
        return;
    if (half->pipe[0] >= 0) {
        pumpPipe(p, half);
        return;
    }
    for (int round = 0; round < READS; round++) {
        ssize_t size = recv(half->fd, p->buffer, BLOCK, 0);
        if (size < 0) {
            int number = errno;
            if (number == EINTR)
                continue;
            if (held)            /* no end comes to go with it; before a reset, which would take its place */
                noDelay(peer);
            if (number == EAGAIN)
                half->last = 0;
            else
                broken(p, half, number);
            return;
        }
        if (!size) {
            readEnded(p, half);
            return;
        }
        held = size < BLOCK && !half->error ? more : 0;
        ssize_t sent = send(peer->fd, p->buffer, size, MSG_NOSIGNAL | held);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EINTR) {
                deaf(p, peer, errno);
                return;
            }
            sent = 0;
        }
        half->count += sent;
        if (sent < size) {
            peer->pending = malloc(size - sent);
            if (!peer->pending) {
                closePair(p, half->pair, ABORTED);
                return;
            }
            memcpy(peer->pending, p->buffer + sent, size - sent);
            peer->from = 0;
            peer->to = size - sent;
            isFull(p, peer);
            return;
        }
        if (size == BLOCK) {
            if (++full == FULL && p->splicing && takePipe(p, half->pipe)) {
                pumpPipe(p, half);
                return;
            }
        } else if (!half->last) {
            return;
        }
    }
    if (held)
        noDelay(peer);
    goOnLater(p, half->pair);
}

/* This side takes bytes again. */
static void flush(pump *p, struct half *half)
{
    struct half *peer = peerOf(half);
    if (half->pending) {
        ssize_t sent = send(half->fd, half->pending + half->from, half->to - half->from, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EINTR)
                deaf(p, half, errno);
            return;
        }
        peer->count += sent;
        half->from += sent;
        if (half->from < half->to)
            return;
        free(half->pending);
        half->pending = NULL;
        if (peer->ended) {
            if (peer->shut)
                closePair(p, half->pair, DONE);
            else
                shutHalf(p, half);
            return;
        }
    }
    pumpHalf(p, peer, 0);
}

static int isDead(int fd)
{
    struct pollfd it = {fd, 0, 0};
    return poll(&it, 1, 0) > 0;
}

static void handle(pump *p, struct half *half, uint32_t events)
{
    struct pair *pair = half->pair;
    if (pair->open && events & EPOLLOUT && (half->pending || peerOf(half)->pipe[0] >= 0))
        flush(p, half);
    if (pair->open && events & INPUT) {
        if (events & LAST)
            half->last = 1;
        pumpHalf(p, half, (events & (EPOLLRDHUP | EPOLLERR)) == EPOLLRDHUP ? MSG_MORE : 0);
        if (pair->open && events & EPOLLERR && isDead(half->fd)) {
            pair->failing = 1;
            oneSided(pair);
        }
    }
}

static void bury(pump *p)
{
    struct pair **where = &p->doomed;
    while (*where) {
        struct pair *pair = *where;
        if (pair->queued) {      /* still in the queue of those that have more to do, which will let go of it */
            where = &pair->next;
        } else {
            *where = pair->next;
            free(pair);
        }
    }
}

/* --- what is called from Python */

pump *pump_new(int mostPipes, int splicing, double halfClosed)
{
    pump *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->all.next = p->all.previous = &p->all;
    p->wake = -1;
    p->mostPipes = mostPipes;
    p->splicing = splicing;
    p->halfClosed = halfClosed;
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    p->buffer = malloc(BLOCK);
    p->idle = calloc(mostPipes > 0 ? mostPipes : 1, sizeof *p->idle);
    if (p->epoll < 0 || !p->buffer || !p->idle || pthread_mutex_init(&p->lock, NULL)) {
        if (p->epoll >= 0)
            close(p->epoll);
        free(p->buffer);
        free(p->idle);
        free(p);
        return NULL;
    }
    return p;
}

int pump_fd(pump *p)
{
    return p->epoll;
}

uint64_t pump_open(pump *p)
{
    return p->open;
}

int pump_pipes(pump *p, int idle)
{
    return idle ? p->idleCount : p->pipes;
}

/*
 * Takes over both descriptors, also where it fails: then they are closed. An id is a small number that no open pair has.
 * Gives 1 where the end has come already, a negative error number where it fails. May be called from any thread.
 */
int pump_add(pump *p, uint64_t id, int client, int backend, const char *early, size_t length)
{
    struct pair *pair = calloc(1, sizeof *pair);
    int fds[2] = {client, backend};
    if (!pair) {
        close(client);
        close(backend);
        return -ENOMEM;
    }
    pair->id = id;
    pair->open = 1;
    pair->lastMoved = -1;
    for (int i = 0; i < 2; i++) {
        struct half *half = &pair->half[i];
        half->pair = pair;
        half->fd = fds[i];
        half->backend = i;
        half->pipe[0] = half->pipe[1] = -1;
    }
    pthread_mutex_lock(&p->lock);
    if (id >= p->slotRoom) {
        size_t room = 2 * id + 64;
        struct pair **more = realloc(p->slots, room * sizeof *more);
        if (!more) {
            pthread_mutex_unlock(&p->lock);
            close(client);
            close(backend);
            free(pair);
            return -ENOMEM;
        }
        memset(more + p->slotRoom, 0, (room - p->slotRoom) * sizeof *more);
        p->slots = more;
        p->slotRoom = room;
    }
    p->slots[id] = pair;
    pair->next = p->all.next;
    pair->previous = &p->all;
    pair->next->previous = pair->previous->next = pair;
    p->open++;
    if (length) {
        struct half *to = &pair->half[1];
        ssize_t sent = send(backend, early, length, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN && errno != EINTR)
                deaf(p, to, errno);
            sent = 0;
        }
        quickAck(backend);
        pair->half[0].count = sent;
        if (!to->error && (size_t) sent < length) {
            to->pending = malloc(length - sent);
            if (to->pending) {
                memcpy(to->pending, early + sent, length - sent);
                to->to = length - sent;
                to->full = 1;
            } else {
                closePair(p, pair, ABORTED);
            }
        }
    }
    for (int i = 0; pair->open && i < 2; i++)
        if (watch(p, &pair->half[i], EPOLL_CTL_ADD) < 0)
            closePair(p, pair, ABORTED);
    int over = !pair->open;      /* it is freed with the next batch */
    pthread_mutex_unlock(&p->lock);
    return over;
}

/* Reset a pair, if it is still open. May be called from any thread. */
void pump_cut(pump *p, uint64_t id)
{
    pthread_mutex_lock(&p->lock);
    if (id < p->slotRoom && p->slots[id])
        closePair(p, p->slots[id], ABORTED);
    pthread_mutex_unlock(&p->lock);
}

/* One batch of events, after waiting so many milliseconds at the most. Gives whether there is more to do at once. */
int pump_run(pump *p, int timeout)
{
    struct epoll_event events[BATCH];
    int count = epoll_wait(p->epoll, events, BATCH, timeout);
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < count; i++)
        if (events[i].data.ptr)
            handle(p, events[i].data.ptr, events[i].events);
    struct pair *again = p->again;
    p->again = NULL;
    while (again) {
        struct pair *pair = again;
        again = pair->again;
        pair->queued = 0;
        for (int i = 0; i < 2 && pair->open; i++)
            pumpHalf(p, &pair->half[i], 0);
    }
    bury(p);
    int more = p->again != NULL;
    pthread_mutex_unlock(&p->lock);
    return more;
}

/* What has ended since it was asked last. May be called from any thread. */
int pump_ended(pump *p, struct ended *into, int most)
{
    pthread_mutex_lock(&p->lock);
    size_t count = p->endingCount < (size_t) most ? p->endingCount : (size_t) most;
    memcpy(into, p->endings, count * sizeof *into);
    memmove(p->endings, p->endings + count, (p->endingCount - count) * sizeof *into);
    p->endingCount -= count;
    pthread_mutex_unlock(&p->lock);
    return (int) count;
}

/* To be called every 15 seconds: keepalive for those that last, an end for those that have stood still for too long. */
void pump_sweep(pump *p)
{
    double at = now();
    pthread_mutex_lock(&p->lock);
    for (struct pair *pair = p->all.next, *next; pair != &p->all; pair = next) {
        next = pair->next;
        struct half *client = &pair->half[0], *backend = &pair->half[1];
        if (!pair->lasting) {
            int on = 1, idle = 60, interval = 15, times = 4;
            pair->lasting = 1;
            setsockopt(backend->fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
            setsockopt(backend->fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
            setsockopt(backend->fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
            setsockopt(backend->fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
        }
        if (pair->lastMoved < 0)
            continue;
        uint64_t moved = client->count + backend->count;
        if (moved != pair->moved) {
            pair->moved = moved;
            pair->lastMoved = at;
        }
        double limit = pair->failing && p->halfClosed > SWEEP ? SWEEP : p->halfClosed;
        if (at - pair->lastMoved < limit)
            continue;
        int found = 0;
        for (int i = 0; pair->failing && i < 2 && !found; i++) {
            int number = pair->half[i].error;
            socklen_t size = sizeof number;
            if (!number)
                getsockopt(pair->half[i].fd, SOL_SOCKET, SO_ERROR, &number, &size);
            if (number) {
                broken(p, &pair->half[i], number);
                found = 1;
            }
        }
        if (!found)
            closePair(p, pair, client->ended ? BACKEND_TIMEOUT : CLIENT_TIMEOUT);
    }
    bury(p);
    pthread_mutex_unlock(&p->lock);
}

/* Run until pump_stop(), in a thread that holds no lock of the interpreter. Endings are told by the eventfd. */
void pump_loop(pump *p)
{
    int more = 0;
    while (!__atomic_load_n(&p->stopping, __ATOMIC_ACQUIRE))
        more = pump_run(p, more ? 0 : -1);
}

/* From now on an eventfd tells of endings; gives it, or a negative error number. */
int pump_notify(pump *p)
{
    if (p->wake < 0)
        p->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return p->wake < 0 ? -errno : p->wake;
}

/* Let pump_loop() return; from another thread. The descriptor is closed with the pump. */
int pump_stop(pump *p)
{
    int knock = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = NULL}};
    __atomic_store_n(&p->stopping, 1, __ATOMIC_RELEASE);
    if (knock < 0 || epoll_ctl(p->epoll, EPOLL_CTL_ADD, knock, &event) < 0)
        return -errno;
    return knock;
}

/* Resets what is open, frees everything. Nobody may be in pump_loop(). */
void pump_free(pump *p)
{
    while (p->all.next != &p->all)
        closePair(p, p->all.next, ABORTED);
    while (p->again) {
        p->again->queued = 0;
        p->again = p->again->again;
    }
    bury(p);
    while (p->idleCount--) {
        close(p->idle[p->idleCount][0]);
        close(p->idle[p->idleCount][1]);
    }
    if (p->wake >= 0)
        close(p->wake);
    close(p->epoll);
    pthread_mutex_destroy(&p->lock);
    free(p->slots);
    free(p->endings);
    free(p->idle);
    free(p->buffer);
    free(p);
}
