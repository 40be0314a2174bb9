"""Which vision-language families mmkd works with, seen on tiny random models of their classes."""
