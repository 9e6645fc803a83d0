"""Mine within geographic cells: the cost grows with the places, not with their square.

In the order of use:

geographic_cells  divide places into cells of bounded size, each with its adjoining cells (pure)
cell_plan         CellPlan: blocks of cells, and the rows of the table that each block needs
cell_tasks        the tasks: deal the table's rows to blocks of cells, mine a block
"""
