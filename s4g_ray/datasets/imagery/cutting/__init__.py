"""Cut the cells of a grid into tar shards of tiles, and describe the region that they make.

cell_blocks  divide cells into compact blocks: a task, a read window and a shard each
tile_shards  cut_block: a block of cells into a tar shard and a table of its rows
block_tasks  cut blocks as Ray tasks, a bounded number at a time, or in this process
coverage     the ground that tiles cover: union, km2, GeoJSON and a map
region       cut a region: plan, tasks, data set and descriptions
summary      Summary: what was cut, what was dropped and why
"""
