"""How OpenMP's threads wait for each other: a setting that must be in the environment before torch is imported."""

# How often a thread looks before it sleeps. By default it spins for milliseconds, which takes the processor from the
# thread that it waits for: beside one busy process, two threads then train at 0.6 of this setting's speed, and on a
# quiet machine no faster. It changes no result.
OPENMP_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}
