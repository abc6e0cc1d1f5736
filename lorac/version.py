"""The version of lorac, where every module can read it without importing the interface."""

VERSION = "0.1.0"
