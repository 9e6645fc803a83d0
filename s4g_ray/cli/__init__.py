"""Run the commands of `s4g`.

app         the command, with demo, train, evaluate, export, check and report
convert     `s4g convert`: a command for each source of data sets
sources/    its commands of further published data sets, and how a converter is run
datasets/   `s4g convert relocate` and `stretch`
pack        `s4g pack`
index       `s4g index plan`
plan        `s4g plan`
prune       `s4g prune`
stages      `s4g embed` and `s4g mine`; jobs/ runs the same functions
imagery     `s4g convert imagery`
areas       areas that options name
galleries/  `s4g gallery`, `s4g locate` and `s4g serve`
demo        the work of `s4g demo`
console     lines and JSON, exit codes, interruptions

Modules import slow packages inside the commands, so that `s4g --help` answers at once.
"""
