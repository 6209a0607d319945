"""A member as a flat graph whose weights are slots, whatever the device."""
