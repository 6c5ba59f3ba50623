"""What the C libraries under torch read when a process starts, and not again.

GOMP_SPINCOUNT: how long OpenMP's threads spin while they wait for each other, before they let another process have the
core. A training step has thousands of parallel regions. GNU's OpenMP (which torch's CPU wheels carry) spins for 300,000
rounds by default, milliseconds, at the end of each: when another process holds a core, the thread that waits burns its
own for nothing. Measured on 2 cores with the embedded sizes (hidden 64 and 128, bf16, tokens/s against the default):
with 2,000 rounds the same when nothing else runs, and 1.7 to 1.9 times as many beside one busy process, more beside
several. Fewer rounds, or OMP_WAIT_POLICY=passive, cost up to a quarter when nothing else runs. The bytes computed are
the same.

MALLOC_ARENA_MAX=1 is not among them: under Ray, which trains in a thread with a memory arena of its own, it made 1.4
times as many tokens/s beside busy processes, but where nothing else runs it costs more than half of them (12.3k instead
of 30k in one process, 12.4k instead of 19.3k in a thread).
"""

WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}
