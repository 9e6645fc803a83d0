"""What a run will take: disk, memory and hours, before it starts.

sizes       RunSizes: rows, places, parameters and D of a run
disk        bytes of each kind of artefact, at most; is there room? (pure)
disk_check  the line about disk at a run's start, and its refusal
memory      memory of each process (pure)
hours       seconds of each stage, and what binds it (pure)
indexes     the indexes of a run, as they will be built
rates       Rates: seconds of a unit of work; from an earlier run's records
measure     rates measured on this machine, within seconds
plan        `s4g plan`: all of it together
"""
