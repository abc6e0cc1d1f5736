"""The page that ``to_html`` writes: what is drawn, where it lies, what a box says, and the page around it."""
