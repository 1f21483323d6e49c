"""The tests. Before any of them imports torch, native libraries get the settings that the program gives them.

They read them once, when they are loaded. By GNU OpenMP's own, idle threads spin, and test processes that run side by
side take the cores from each other.
"""

from splitlearn.runtime import environment

environment.set_defaults()
