"""Settings that the C libraries under torch read when a process starts, and not again.

GOMP_SPINCOUNT: how long OpenMP's threads spin while they wait for each other, before they let another process have the
core. A training step has thousands of parallel regions. GNU's OpenMP (which torch's CPU wheels carry) spins for 300,000
rounds by default, milliseconds, at the end of each: when another process holds a core, the thread that waits burns its
own for nothing. Measured on 2 cores with the embedded sizes (hidden 64 and 128, bf16, tokens/s against the default):
with 2,000 rounds the same when nothing else runs, and 1.7 to 1.9 times as many beside one busy process, more beside
several. Fewer rounds, or OMP_WAIT_POLICY=passive, cost up to a quarter when nothing else runs.

MALLOC_ARENA_MAX: one memory arena for all threads. Ray runs the training in a thread that is not the main one, and
glibc gives such a thread an arena of pieces of 64 MB that go back to the kernel whenever they are free, whatever
`allocator` says: every step maps and zeroes them anew. Measured with `cluster=local` on the smallest embedded model:
1.37 times as many tokens/s (13.3k against 9.7k, 14.0k against 10.2k, in turns on a busy machine).

The bytes computed are the same.
"""

WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000", "MALLOC_ARENA_MAX": "1"}
