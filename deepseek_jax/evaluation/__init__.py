"""What a model can do: tasks with their error bars, needles in long texts."""
