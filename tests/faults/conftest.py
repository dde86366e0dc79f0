def pytest_addoption(parser):
    parser.addoption("--kills", help="file that the slow kills add their histograms to")
