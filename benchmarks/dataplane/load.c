/*
 * The load of the data plane's measurements, and the server for bulk. One program, by its first argument:
 *
 *   serve PORT ...                               answers 'd' with bytes without end, counts what follows 'u'
 *   bulk down|up HOST PORT STREAMS SECONDS       prints bytes and seconds
 *   open HOST PORT CONNECTIONS RATE SECONDS      HTTP requests at fixed moments; prints microseconds, one per request
 *   hold HOST PORT COUNT                         opens so many, one request each; prints "held N", closes at end of input
 *   echo PORT ...                                sends datagrams back
 *   datagrams HOST PORT SOCKETS TRAIN WINDOW SIZE SECONDS
 *                                                so many datagrams at a time (more than one: as a single call with
 *                                                UDP_SEGMENT), so many such trains on their way per socket; prints
 *                                                replies and seconds
 *
 * open counts time from the moment at which a request was due, not from when it could be sent: a proxy that stands still
 * for 10 ms makes all late that were due meanwhile.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define BLOCK (256 << 10)
#define FILE_SIZE (64 << 20)
#define BATCH 64
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
static const char REQUEST[] = "GET / HTTP/1.1\r\nHost: b\r\n\r\n";
static int content;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec it;
    clock_gettime(CLOCK_MONOTONIC, &it);
    return it.tv_sec + it.tv_nsec / 1e9;
}

static int dial(const char *host, const char *port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || inet_pton(AF_INET, host, &to.sin_addr) != 1)
        die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (struct sockaddr *) &to, sizeof to) < 0)
        die("connect");
    return fd;
}

/* --- bulk */

static void *serveOne(void *argument)
{
    int fd = (int) (intptr_t) argument;
    char word, *buffer = malloc(BLOCK);
    if (recv(fd, &word, 1, 0) != 1) {
        /* whoever it was is gone */
    } else if (word == 'd') {
        for (off_t at = 0;;) {
            ssize_t sent = sendfile(fd, content, &at, FILE_SIZE - at);
            if (sent <= 0)
                break;
            if (at == FILE_SIZE)
                at = 0;
        }
    } else {
        uint64_t total = 1;
        ssize_t size;
        while ((size = recv(fd, buffer, BLOCK, 0)) > 0)
            total += size;
        if (!size && send(fd, &total, sizeof total, MSG_NOSIGNAL) < 0)
            perror("send");
    }
    free(buffer);
    close(fd);
    return NULL;
}

static void *listenOn(void *argument)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argument))};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *) &at, sizeof at) < 0 || listen(listener, 128) < 0)
        die("listen");
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        pthread_t thread;
        if (fd < 0)
            continue;
        if (pthread_create(&thread, NULL, serveOne, (void *) (intptr_t) fd))
            close(fd);
        else
            pthread_detach(thread);
    }
    return NULL;
}

static void serve(int count, char **ports)
{
    pthread_t thread;
    content = memfd_create("content", MFD_CLOEXEC);
    char *block = calloc(1, BLOCK);
    for (int i = 0; i < FILE_SIZE / BLOCK; i++)
        if (write(content, block, BLOCK) != BLOCK)
            die("memfd");
    for (int i = 0; i < count; i++)
        if (pthread_create(&thread, NULL, listenOn, ports[i]))
            die("thread");
    pause();
}

static const char *bulkHost, *bulkPort;
static double bulkSeconds;
static int bulkUp;

static void *stream(void *argument)
{
    int fd = dial(bulkHost, bulkPort);
    char *buffer = calloc(1, BLOCK);
    uint64_t total = 0, *into = argument;
    buffer[0] = bulkUp ? 'u' : 'd';
    if (send(fd, buffer, 1, 0) != 1)
        die("send");
    double end = now() + bulkSeconds;
    if (bulkUp) {
        while (now() < end)
            if (send(fd, buffer, BLOCK, MSG_NOSIGNAL) < 0)
                die("send");
        shutdown(fd, SHUT_WR);
        if (recv(fd, &total, sizeof total, MSG_WAITALL) != sizeof total)
            die("no count");
    } else {
        ssize_t size;
        while (now() < end && (size = recv(fd, buffer, BLOCK, 0)) > 0)
            total += size;
    }
    *into = total;
    close(fd);
    return NULL;
}

static void bulk(int streams)
{
    pthread_t threads[streams];
    uint64_t totals[streams], total = 0;
    double began = now();
    for (int i = 0; i < streams; i++)
        pthread_create(&threads[i], NULL, stream, &totals[i]);
    for (int i = 0; i < streams; i++) {
        pthread_join(threads[i], NULL);
        total += totals[i];
    }
    printf("%llu %.6f\n", (unsigned long long) total, now() - began);
}

/* --- HTTP */

/* One request and its answer, of which all further ones have the size. */
static size_t ask(int fd)
{
    char reply[4096];
    size_t size = 0;
    if (send(fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) != sizeof REQUEST - 1)
        die("send");
    for (;;) {
        ssize_t got = recv(fd, reply + size, sizeof reply - 1 - size, 0);
        if (got <= 0)
            die("no answer");
        size += got;
        reply[size] = 0;
        char *body = strstr(reply, "\r\n\r\n"), *length = strstr(reply, "Content-Length: ");
        if (body && length && size == (body + 4 - reply) + strtoul(length + 16, NULL, 10))
            return size;
    }
}

struct asker {
    int fd, first, count, busy;   /* which of the dues are waiting or on their way */
    size_t left;
};

static void openLoop(const char *host, const char *port, int connections, double rate, double seconds)
{
    int total = rate * seconds, next = 0, done = 0;
    struct asker *askers = calloc(connections, sizeof *askers);
    uint32_t *took = calloc(total, sizeof *took);
    int poll = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[64];
    size_t size = 0;
    for (int i = 0; i < connections; i++) {
        askers[i].fd = dial(host, port);
        for (int k = 0; k < 3; k++)
            size = ask(askers[i].fd);
        fcntl(askers[i].fd, F_SETFL, O_NONBLOCK);
        event.data.ptr = &askers[i];
        epoll_ctl(poll, EPOLL_CTL_ADD, askers[i].fd, &event);
    }
    event.data.ptr = NULL;
    epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event);
    double began = now() + 0.01, late = began + seconds + 2;
    struct itimerspec due = {{0, 0}, {0, 0}};
    char buffer[4096];
    while (done < total && now() < late) {
        if (next < total) {
            double at = began + next / rate;
            due.it_value.tv_sec = at;
            due.it_value.tv_nsec = (at - due.it_value.tv_sec) * 1e9;
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &due, NULL);
        }
        int count = epoll_wait(poll, events, 64, 100);
        for (int i = 0; i < count; i++) {
            struct asker *it = events[i].data.ptr;
            if (!it)
                continue;
            ssize_t got = recv(it->fd, buffer, sizeof buffer, 0);
            if (got < 0 && errno == EAGAIN)
                continue;
            if (got <= 0)
                die("closed");
            it->left -= got;
            if (it->left)
                continue;
            took[it->first] = (now() - (began + it->first / rate)) * 1e6 + 0.5;
            done++;
            it->count--;
            it->first += connections;
            it->busy = 0;
            if (it->count) {
                it->left = size;
                it->busy = 1;
                if (send(it->fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) < 0)
                    die("send");
            }
        }
        /* The n-th request is for connection n modulo their number, whether that is free or not. */
        for (; next < total && began + next / rate <= now(); next++) {
            struct asker *it = &askers[next % connections];
            if (!it->count++)
                it->first = next;
            if (!it->busy) {
                it->left = size;
                it->busy = 1;
                if (send(it->fd, REQUEST, sizeof REQUEST - 1, MSG_NOSIGNAL) < 0)
                    die("send");
            }
        }
    }
    for (int i = 0; i < total; i++)
        printf("%u\n", took[i] ? took[i] : 2000000);
}

static void hold(const char *host, const char *port, int count)
{
    int *fds = malloc(count * sizeof *fds);
    char byte;
    for (int i = 0; i < count; i++) {
        fds[i] = dial(host, port);
        ask(fds[i]);
    }
    printf("held %d\n", count);
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        continue;
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

/* --- UDP */

/* What recvmmsg() and sendmmsg() need for a batch. */
struct batch {
    struct mmsghdr head[BATCH];
    struct iovec part[BATCH];
    struct sockaddr_in from[BATCH];
    char control[BATCH][CMSG_SPACE(sizeof(int))];
    char data[BATCH][65536];
};

static int receive(int fd, struct batch *it, int flags)
{
    for (int i = 0; i < BATCH; i++) {
        it->part[i] = (struct iovec) {it->data[i], sizeof it->data[i]};
        it->head[i].msg_hdr = (struct msghdr) {
            .msg_name = &it->from[i], .msg_namelen = sizeof it->from[i], .msg_iov = &it->part[i], .msg_iovlen = 1,
            .msg_control = it->control[i], .msg_controllen = sizeof it->control[i]};
    }
    return recvmmsg(fd, it->head, BATCH, flags, NULL);
}

/* The size of the datagrams that a message was put together of; 0 where it is a single one. */
static int segmentOf(struct msghdr *message)
{
    struct cmsghdr *it = CMSG_FIRSTHDR(message);
    return it && it->cmsg_level == IPPROTO_UDP && it->cmsg_type == UDP_GRO ? *(int *) CMSG_DATA(it) : 0;
}

static void setSegment(struct msghdr *message, void *control, int size)
{
    message->msg_control = control;
    message->msg_controllen = CMSG_SPACE(sizeof(uint16_t));
    struct cmsghdr *it = CMSG_FIRSTHDR(message);
    it->cmsg_level = IPPROTO_UDP;
    it->cmsg_type = UDP_SEGMENT;
    it->cmsg_len = CMSG_LEN(sizeof(uint16_t));
    *(uint16_t *) CMSG_DATA(it) = size;
}

static int datagramSocket(void)
{
    int size = 4 << 20, on = 1, fd = socket(AF_INET, SOCK_DGRAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof on);
    return fd;
}

static void *echoOn(void *argument)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(argument))};
    struct batch *it = calloc(1, sizeof *it);
    int fd = datagramSocket();
    if (bind(fd, (struct sockaddr *) &at, sizeof at) < 0)
        die("bind");
    for (;;) {
        int count = receive(fd, it, MSG_WAITFORONE);
        for (int i = 0; i < count; i++) {
            int segment = segmentOf(&it->head[i].msg_hdr), size = it->head[i].msg_len;
            it->part[i].iov_len = size;
            it->head[i].msg_hdr.msg_control = NULL;
            it->head[i].msg_hdr.msg_controllen = 0;
            if (segment && segment < size)
                setSegment(&it->head[i].msg_hdr, it->control[i], segment);
        }
        for (int sent = 0; sent < count;) {
            int more = sendmmsg(fd, it->head + sent, count - sent, 0);
            sent += more > 0 ? more : 1;
        }
    }
    return NULL;
}

static void echo(int count, char **ports)
{
    pthread_t thread;
    for (int i = 0; i < count; i++)
        if (pthread_create(&thread, NULL, echoOn, ports[i]))
            die("thread");
    pause();
}

struct sender {
    int fd, owed;      /* replies that are still to come before another train goes */
    double heard;
};

static void sendTrains(struct sender *it, struct batch *with, int trains, int train, int size)
{
    static char data[65536];
    for (int i = 0; i < trains; i++) {
        with->part[i] = (struct iovec) {data, train * size};
        with->head[i].msg_hdr = (struct msghdr) {.msg_iov = &with->part[i], .msg_iovlen = 1};
        if (train > 1)
            setSegment(&with->head[i].msg_hdr, with->control[i], size);
    }
    if (trains && sendmmsg(it->fd, with->head, trains, 0) < 0 && errno != EAGAIN && errno != ECONNREFUSED)
        die("sendmmsg");
}

static void datagrams(const char *host, const char *port, int sockets, int train, int window, int size, double seconds)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
    struct sender *senders = calloc(sockets, sizeof *senders);
    struct batch *with = calloc(1, sizeof *with);
    struct epoll_event event = {.events = EPOLLIN}, events[64];
    int poll = epoll_create1(0);
    uint64_t total = 0;
    inet_pton(AF_INET, host, &to.sin_addr);
    double began = now(), at = began, end = began + seconds;
    for (int i = 0; i < sockets; i++) {
        senders[i].fd = datagramSocket();
        senders[i].heard = began;
        if (connect(senders[i].fd, (struct sockaddr *) &to, sizeof to) < 0)
            die("connect");
        event.data.ptr = &senders[i];
        epoll_ctl(poll, EPOLL_CTL_ADD, senders[i].fd, &event);
        sendTrains(&senders[i], with, window, train, size);
    }
    while ((at = now()) < end) {
        int count = epoll_wait(poll, events, 64, 20);
        at = now();
        for (int i = 0; i < count; i++) {
            struct sender *it = events[i].data.ptr;
            int got = receive(it->fd, with, MSG_DONTWAIT), replies = 0;
            for (int k = 0; k < got; k++)
                replies += with->head[k].msg_len / size;
            if (got <= 0)
                continue;
            total += replies;
            it->heard = at;
            it->owed += replies;
            int trains = it->owed / train;
            it->owed -= trains * train;
            sendTrains(it, with, trains < BATCH ? trains : BATCH, train, size);
        }
        /* What was lost is not waited for. */
        for (int i = 0; i < sockets; i++)
            if (at - senders[i].heard > 0.05) {
                senders[i].heard = at;
                senders[i].owed = 0;
                sendTrains(&senders[i], with, window, train, size);
            }
    }
    printf("%llu %.6f\n", (unsigned long long) total, at - began);
}

int main(int count, char **words)
{
    signal(SIGPIPE, SIG_IGN);
    if (count > 2 && !strcmp(words[1], "serve")) {
        serve(count - 2, words + 2);
    } else if (count == 7 && !strcmp(words[1], "bulk")) {
        bulkUp = !strcmp(words[2], "up");
        bulkHost = words[3];
        bulkPort = words[4];
        bulkSeconds = atof(words[6]);
        bulk(atoi(words[5]));
    } else if (count == 7 && !strcmp(words[1], "open")) {
        openLoop(words[2], words[3], atoi(words[4]), atof(words[5]), atof(words[6]));
    } else if (count == 5 && !strcmp(words[1], "hold")) {
        hold(words[2], words[3], atoi(words[4]));
    } else if (count > 2 && !strcmp(words[1], "echo")) {
        echo(count - 2, words + 2);
    } else if (count == 9 && !strcmp(words[1], "datagrams")) {
        datagrams(words[2], words[3], atoi(words[4]), atoi(words[5]), atoi(words[6]), atoi(words[7]), atof(words[8]));
    } else {
        fprintf(stderr, "see the head of load.c\n");
        return 2;
    }
    return 0;
}
