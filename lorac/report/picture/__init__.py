"""The page that ``to_html`` writes: its boxes, their places and texts, and the page around them."""
