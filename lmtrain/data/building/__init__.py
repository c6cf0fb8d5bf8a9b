"""A token store in the making: blocks of text parsed, counted and encoded by several processes, and put together."""
