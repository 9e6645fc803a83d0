"""The published algorithm's form, measured beside ours."""
