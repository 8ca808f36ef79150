from blip2.ui import main

if __name__ == "__main__":
    main()
