"""`aseer doctor --gpu`: what to see on a new machine before a long run is given to it.

Steps in the order in which one rests on the other (`plan`); the first that fails ends
them, since what comes after would only fail for the same reason. A step measures, and a
pure function judges what was measured, so that every judgement is tested without
engines (`steps`). What can be exact is compared in float32, in which equal means equal;
speeds are recorded, and fail nothing. What needs a GPU is skipped on a CPU, with the
reason, and all else is smaller there, so that the list itself is known to work.
"""
