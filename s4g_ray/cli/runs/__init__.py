"""Run the commands about runs.

plan       `s4g plan`: what a run will take
live       the display of `s4g train` in a terminal
run_state  what a run's records tell: epochs, recall, workers, time left
run_view   a run's state as a line, a table and plain lines
watch      `s4g watch`: a run that trains elsewhere
watched_run  how such a run stands, by its folder's lease too
prune      `s4g prune`
"""
