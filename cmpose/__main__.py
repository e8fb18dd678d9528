from cmpose.cli import main

main()
