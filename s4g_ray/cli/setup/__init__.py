"""Run the commands around an installation.

configs    `s4g configs`: the configurations that come with the package
doctor     `s4g doctor`: what this machine has, and what to do about what it lacks
finding    what it finds: a state, a value, and what to do
libraries  Python, libraries, extras and the FAISS build
machine    cores, memory, GPUs, shared memory, temporary folder, HOME
access     the Ray cluster, and the stores of given URIs
"""
