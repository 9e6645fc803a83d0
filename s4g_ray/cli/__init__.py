"""The s4g command.

app      the s4g command: demo, train, evaluate, export, check, report
convert  s4g convert
pack     s4g pack
index    s4g index plan
stages   s4g embed, s4g mine
demo     s4g demo
console  JSON, exit codes, interrupts
"""
