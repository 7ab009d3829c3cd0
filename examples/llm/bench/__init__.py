"""The benchmark of zeroth-order fine-tuning: methods, schemes of tuning and tasks side by side."""
