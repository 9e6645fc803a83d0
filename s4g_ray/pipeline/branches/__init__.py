"""Branches of a run: train on from an earlier checkpoint, with other values where they may change.

branch_record  Branch: what run.json says of a branch
branch         find_branch: which values may change, and from which checkpoint
make_branch    keep what followed the checkpoint in branches/NAME/, and record the branch
"""
