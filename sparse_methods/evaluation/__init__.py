"""What a method costs in quality: tasks, measures and their intervals; knows no service."""
