"""The rewriter measured on folders of real code. Only the test of the measure itself is an ordinary test."""
